//! `deltallm inspect`: what a model directory holds, without a device; with `--prompt`, what a policy
//! does to the attention of a text.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use deltallm::checkpoint::{ModelConfig, Ternary};
use deltallm::delta::KeyFormat;
use deltallm::model::plan_memory;
use deltallm::{DEFAULT_CONTEXT, check_context};

use crate::args::{DeviceArgs, open_checkpoint};
use crate::attention_args::AttentionArgs;
use crate::inspect_attention::{self, PromptArgs};
use crate::output::{Outcome, bytes, parameters};

/// Options of `inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory [default: the model inside this program]
    dir: Option<PathBuf>,

    /// Context length to count memory for [default: 4096, or the model's limit]; with --prompt, tokens
    /// that the text may have
    #[arg(long, value_name = "N")]
    context: Option<usize>,

    /// List every tensor
    #[arg(long, conflicts_with = "prompt")]
    tensors: bool,

    #[command(flatten)]
    prompt: PromptArgs,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    attention: AttentionArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    if let Some(prompt) = &args.prompt.prompt {
        let attention = args.attention.prompt_policy()?;
        return inspect_attention::run(
            args.dir.as_deref(),
            &args.device,
            &attention,
            prompt,
            &args.prompt,
            args.context,
        );
    }
    let attention = args.attention.policy()?;
    let policy = attention.policy;
    args.device.refuse("needs --prompt: without it no device is opened")?;
    let checkpoint = open_checkpoint(args.dir.as_deref())?;
    let mut out = io::stdout().lock();
    let config = &checkpoint.config;
    attention.check(config)?;
    let context = args.context.unwrap_or(DEFAULT_CONTEXT.min(config.context));
    check_context(context, config)?;
    architecture(&mut out, config)?;

    let mut by_type: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for (_, info) in checkpoint.tensors.iter() {
        let entry = by_type.entry(format!("{:?}", info.dtype)).or_default();
        entry.0 += 1;
        entry.1 += info.bytes as u64;
    }
    writeln!(out, "tensors        {}", bytes(checkpoint.tensors.total_bytes()))?;
    for (dtype, (count, size)) in by_type {
        writeln!(out, "  {dtype:<12} {count} tensors, {}", bytes(size))?;
    }
    if args.tensors {
        for (name, info) in checkpoint.tensors.iter() {
            let (dtype, shape) = (format!("{:?}", info.dtype), format!("{:?}", info.shape));
            let size = bytes(info.bytes as u64);
            writeln!(out, "  {name:<56} {dtype:<5} {shape:<16} {size:>10}")?;
        }
    }

    let embedding = checkpoint.tensors.get("model.embed_tokens.weight");
    let stored = embedding.map_or(2, |info| info.dtype.bitsize() / 8);
    let plan = plan_memory(config, stored, args.device.weights.into(), context, &policy);
    writeln!(out, "memory         {} for {context} tokens", bytes(plan.total()))?;
    writeln!(out, "  weights      {}", bytes(plan.weights))?;
    let cache = plan.keys.saturating_add(plan.values);
    let per_token = cache / context.max(1) as u64;
    writeln!(
        out,
        "  cache        {}, {} a token: keys {}{}, values {}",
        bytes(cache),
        bytes(per_token),
        // How many differences will be kept is not known before.
        if matches!(policy.keys, KeyFormat::Delta(_)) { "at most " } else { "" },
        bytes(plan.keys),
        bytes(plan.values)
    )?;
    writeln!(out, "  activations  {}", bytes(plan.activations))?;
    Ok(())
}

fn architecture(out: &mut impl Write, config: &ModelConfig) -> io::Result<()> {
    let a = &config.attention;
    writeln!(out, "architecture   {}", config.architecture.name())?;
    writeln!(out, "parameters     {}", parameters(config.parameters()))?;
    writeln!(out, "layers         {}", config.layers)?;
    writeln!(out, "hidden         {}", config.hidden)?;
    writeln!(out, "intermediate   {}, {:?}", config.intermediate, config.activation)?;
    writeln!(out, "attention      {} heads over {} of {}", a.heads, a.kv_heads, a.head_dim)?;
    let tied = match config.tied_head {
        Some(true) => ", tied head",
        Some(false) => ", head of its own",
        None => "",
    };
    writeln!(out, "vocabulary     {}{tied}", config.vocabulary)?;
    writeln!(out, "context        {} tokens", config.context)?;
    write!(out, "rope           theta {}", config.rope.theta)?;
    match config.rope.scaling {
        Some(s) => writeln!(
            out,
            ", llama3: factor {}, low {}, high {}, original {}",
            s.factor, s.low_freq_factor, s.high_freq_factor, s.original_context
        )?,
        None => writeln!(out)?,
    }
    let storage = match config.ternary {
        None => "float weights",
        Some(Ternary::PackedMultiply) => "packed ternary, output times weight_scale",
        Some(Ternary::PackedDivide) => "packed ternary, output divided by weight_scale",
        Some(Ternary::Master) => "float master weights, ternarised at load",
    };
    writeln!(out, "body           {storage}")?;
    writeln!(out, "end of text    {:?}", config.eos)
}
