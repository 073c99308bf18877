//! `deltallm inspect`: what a model directory holds, without a device.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use deltallm::checkpoint::{Checkpoint, ModelConfig, Ternary};
use deltallm::delta::AttentionPolicy;
use deltallm::model::plan_memory;
use deltallm::{DEFAULT_CONTEXT, check_context};

use crate::args::{Cache, Weights};
use crate::output::{Outcome, bytes};

/// Options of `inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory
    dir: PathBuf,

    /// Context length to count memory for [default: 4096, or the model's limit]
    #[arg(long, value_name = "N")]
    context: Option<usize>,

    /// Format of float weights to count memory for
    #[arg(long, value_enum, default_value_t = Weights::Stored)]
    weights: Weights,

    /// Format of cached keys and values to count memory for
    #[arg(long, value_enum, default_value_t = Cache::F16)]
    cache: Cache,

    /// List every tensor
    #[arg(long)]
    tensors: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let mut out = io::stdout().lock();
    let config = &checkpoint.config;
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
    let policy = AttentionPolicy::plain(args.cache.into());
    let plan = plan_memory(config, stored, args.weights.into(), context, &policy);
    writeln!(out, "memory         {} for {context} tokens", bytes(plan.total()))?;
    writeln!(out, "  weights      {}", bytes(plan.weights))?;
    let per_token = (plan.keys + plan.values) / context.max(1) as u64;
    writeln!(
        out,
        "  cache        {}, {} a token",
        bytes(plan.keys + plan.values),
        bytes(per_token)
    )?;
    writeln!(out, "  activations  {}", bytes(plan.activations))?;
    Ok(())
}

fn architecture(out: &mut impl Write, config: &ModelConfig) -> io::Result<()> {
    let a = &config.attention;
    writeln!(out, "architecture   {}", config.architecture.name())?;
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
