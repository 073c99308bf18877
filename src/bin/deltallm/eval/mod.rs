//! `deltallm eval`: how good a model is at tasks, and what attention policies cost of that.

mod candidates;
mod report;
mod samples;

use std::io::Write;
use std::path::PathBuf;

use clap::ValueEnum;
use deltallm::eval::{
    Candidate, PasskeyOptions, PrepareOptions, Prepared, Scorer, Stage, Task, TaskKind,
};
use deltallm::{Cancel, Error, Model};

use crate::args::ModelArgs;
use crate::attention_args::AttentionArgs;
use crate::output::{Failure, Outcome, count_bar, say, stop_on_interrupt};
use report::Report;
use samples::{Fingerprint, Samples};

/// Window of a text where the model allows more, in tokens.
const WINDOW: usize = 2048;

const FIELDS: &str = "\
Files, one row a line (.jsonl), are recognised by their fields:
  text          text
  choice        context, choices (with the space before them), label (from 0)
  question      context, question, answers ([...] or {\"text\": [...]}; none where unanswerable);
                optional title, prompt, no_answer [default: unanswerable]
  passkey       context (ending in the question), answer; optional depth (0 to 1), length
  Winogrande    sentence, option1, option2, answer
  ARC           question, choices {text, label}, answerKey (OpenBookQA: question_stem)
  PIQA          goal, sol1, sol2, label
  HellaSwag     activity_label, ctx_a, ctx_b, endings, label
  lm-evaluation-harness --log_samples: doc, arguments, target
SQuAD's own .json files are read, too. Any other file is one text.

Texts begin as the model's tokenizer begins them: with BOS, where it has one.

Metrics: perplexity; accuracy by log-likelihood (acc) and by log-likelihood a character (acc_norm);
F1 and exact match as SQuAD 2.0 scores them, an answer equal to no_answer counting as none;
passkeys found. KL is the divergence of next-token distributions from dense attention's, over the
scored tokens; of an answer at its first token. ± is the standard error over rows, of a single text
over its windows.";

/// Options of `eval`.
#[derive(clap::Args)]
#[command(after_long_help = FIELDS)]
pub struct Args {
    /// Tasks: texts, and files of rows as listed below
    #[arg(value_name = "FILE", required_unless_present = "passkey_lengths")]
    files: Vec<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    /// Compare policies: every combination of these values, such as theta=0.5sigma,1sigma; may be
    /// given more than once. Other fields are those of the attention options, or of
    /// --attention delta
    #[arg(long, value_name = "FIELD=A,B,..")]
    sweep: Vec<String>,

    /// One more policy, as text or as a file that calibrate has written (.json); may be given more than
    /// once
    #[arg(long, value_name = "POLICY")]
    compare: Vec<String>,

    /// What of a row runs as a prompt: all of it, or only what stands before the tokens that are
    /// scored or answered; or both, one after the other
    #[arg(long, value_enum, default_value_t = Stages::Prefill)]
    stage: Stages,

    /// Rows of each file at most
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true)]
    limit: usize,

    /// Tokens of a window of a text [default: 2048, or the model's context where that is less]
    #[arg(long, value_name = "N")]
    length: Option<usize>,

    /// Tokens from one window of a text to the next [default: half a window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,

    #[arg(long, value_name = "N", help = "Tokens that an answer may have [default: 32]")]
    answer_tokens: Option<usize>,

    /// Make a passkey task with prompts of these lengths in tokens
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    passkey_lengths: Vec<usize>,

    /// Where the key is told: 0 at the beginning, 1 at the end
    #[arg(long, value_name = "D,..", value_delimiter = ',', requires = "passkey_lengths",
        default_values_t = [0.0, 0.25, 0.5, 0.75, 1.0])]
    passkey_depths: Vec<f64>,

    /// Keys for each length and depth
    #[arg(long, value_name = "N", requires = "passkey_lengths", default_value_t = 10)]
    passkey_count: usize,

    /// Leave out rows that do not fit in the model's context, instead of an error
    #[arg(long)]
    skip_long: bool,

    /// Directory for results.json, results.csv, plots, and samples.jsonl with every row's outcome; a
    /// run that was stopped goes on from there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Forget what an earlier run has left in --out
    #[arg(long, requires = "out")]
    fresh: bool,

    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    attention: AttentionArgs,
}

/// Which stages to run.
#[derive(Clone, Copy, ValueEnum)]
enum Stages {
    Prefill,
    Decode,
    Both,
}

impl Stages {
    fn list(self) -> &'static [Stage] {
        match self {
            Self::Prefill => &[Stage::Prefill],
            Self::Decode => &[Stage::Decode],
            Self::Both => &[Stage::Prefill, Stage::Decode],
        }
    }
}

/// A task as tokens.
pub struct Work {
    pub task: Task,
    /// `None` for a row that is left out.
    pub rows: Vec<Option<Prepared>>,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let base = match args.sweep.is_empty() {
        true => args.attention.policy()?,
        false => args.attention.delta_policy()?,
    };
    let candidates = candidates::list(&base, &args.sweep, &args.compare)?;
    if args.limit == 0 {
        let (value, allowed) = ("0".into(), "must be at least 1 row".into());
        return Err(Error::Parameter { name: "limit", value, allowed }.into());
    }
    let mut tasks = args
        .files
        .iter()
        .map(|file| Task::read(file, args.limit))
        .collect::<Result<Vec<_>, _>>()?;
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let opened = args.model.open(&cancel)?;
    let model = &opened.model;
    if !args.passkey_lengths.is_empty() {
        let options = PasskeyOptions {
            lengths: args.passkey_lengths.clone(),
            depths: args.passkey_depths.clone(),
            count: args.passkey_count,
            seed: 0,
        };
        tasks.push(options.task(model.tokenizer(), model.config().context)?);
    }
    args.check_effect(&tasks)?;
    names_differ(&mut tasks);
    let work = args.prepare(model, tasks)?;
    let samples = match &args.out {
        Some(out) => {
            let settings = args.settings(model, &candidates, &work, &cancel)?;
            Samples::open(out, args.fresh, &settings)?
        }
        None => Samples::default(),
    };
    let mut report = Report::new(&opened.name, model, &candidates);
    let finished = score(args, model, &candidates, &work, samples, &cancel, &mut report);
    if let Err(Failure::Interrupted) = finished {
        say!(
            "stopped: {}",
            match &args.out {
                Some(_) => "the same command goes on from here",
                None => "with --out DIR, the same command would go on from here",
            }
        );
        return finished;
    }
    finished?;
    if let Some(out) = &args.out {
        report.write(out)?;
    }
    let mut stdout = std::io::stdout().lock();
    match args.json {
        true => writeln!(stdout, "{:#}", report.json())?,
        false => write!(stdout, "{}", report.tables())?,
    }
    Ok(())
}

fn score(
    args: &Args,
    model: &Model,
    candidates: &[Candidate],
    work: &[Work],
    mut samples: Samples,
    cancel: &Cancel,
    report: &mut Report,
) -> Outcome {
    let rows = |work: &Work| work.rows.iter().flatten().map(Prepared::tokens).sum::<usize>();
    let all = work.iter().map(rows).sum::<usize>() * args.stage.list().len();
    let bar = count_bar(all, "tokens of each policy");
    for &stage in args.stage.list() {
        let scorer = Scorer { model, candidates, stage, cancel: cancel.clone() };
        for (index, work) in work.iter().enumerate() {
            let mut outcomes = Vec::new();
            for (number, row) in work.rows.iter().enumerate() {
                let Some(row) = row else { continue };
                let found = match samples.get(stage, index, number) {
                    Some(found) => found,
                    None => {
                        let found = scorer.score(row)?;
                        samples.put(stage, index, number, &work.task.rows[number].id, &found)?;
                        found
                    }
                };
                outcomes.push(found);
                bar.inc(row.tokens() as u64);
            }
            bar.suspend(|| report.add(work, stage, &outcomes));
        }
    }
    bar.finish_and_clear();
    Ok(())
}

impl Args {
    fn prepare_options(&self, model: &Model) -> PrepareOptions {
        let length = self.length.unwrap_or(WINDOW.min(model.config().context));
        let stride = self.stride.unwrap_or((length / 2).max(1));
        PrepareOptions { length, stride, answer: self.answer_tokens.unwrap_or(32) }
    }

    /// Refuses options that no task heeds.
    fn check_effect(&self, tasks: &[Task]) -> Result<(), Error> {
        let has = |kind| tasks.iter().any(|task| task.kind == kind);
        for (name, value, kind) in [
            ("length", self.length, TaskKind::Text),
            ("stride", self.stride, TaskKind::Text),
            ("answer-tokens", self.answer_tokens, TaskKind::Question),
        ] {
            if let Some(value) = value.filter(|_| !has(kind)) {
                let allowed = format!("has no effect: no task is of kind {}", kind.name());
                return Err(Error::Parameter { name, value: value.to_string(), allowed });
            }
        }
        Ok(())
    }

    /// Makes tokens of all rows, so that what is wrong with one is found before the work begins.
    fn prepare(&self, model: &Model, tasks: Vec<Task>) -> Result<Vec<Work>, Error> {
        let (options, context) = (self.prepare_options(model), model.config().context);
        let mut all = Vec::with_capacity(tasks.len());
        for task in tasks {
            let mut rows = Vec::with_capacity(task.rows.len());
            for row in &task.rows {
                let prepared = Prepared::new(row, model.tokenizer(), &options)?;
                let needed = prepared.longest();
                if needed > context && !self.skip_long {
                    return Err(Error::Parameter {
                        name: "row",
                        value: format!("{} of {}", row.id, task.name),
                        allowed: format!(
                            "needs {needed} tokens, but the model's context is {context}; \
                             --skip-long leaves such rows out, and --length shortens the windows of a \
                             text"
                        ),
                    });
                }
                rows.push((needed <= context).then_some(prepared));
            }
            if rows.iter().all(Option::is_none) {
                return Err(Error::Parameter {
                    name: "task",
                    value: task.name,
                    allowed: format!("no row fits in the model's context of {context} tokens"),
                });
            }
            all.push(Work { task, rows });
        }
        Ok(all)
    }

    /// Everything that outcomes depend on: a run goes on only where it is the same. What the model
    /// makes of some tokens stands for its weights, their format and the device.
    fn settings(
        &self,
        model: &Model,
        candidates: &[Candidate],
        work: &[Work],
        cancel: &Cancel,
    ) -> Result<Fingerprint, Error> {
        let mut settings = Fingerprint::default();
        settings.add(&(env!("CARGO_PKG_VERSION"), model.config(), self.prepare_options(model)));
        let vocabulary = model.config().vocabulary as u32;
        let ids: Vec<u32> = (0..16.min(model.config().context as u32))
            .map(|i| i.wrapping_mul(7919) % vocabulary)
            .collect();
        model.logits(&ids, &candidates[0].attention, cancel, |rows| {
            settings.add(&rows);
            Ok(())
        })?;
        for Candidate { attention, thresholds, .. } in candidates {
            settings.add(&(attention, thresholds));
        }
        for Work { task, rows } in work {
            settings.add(&(&task.name, &task.rows, rows));
        }
        Ok(settings)
    }
}

/// Two tasks of one name would be one file in --out; names are made fit for files.
fn names_differ(tasks: &mut [Task]) {
    for at in 0..tasks.len() {
        let (before, rest) = tasks.split_at_mut(at);
        let fit = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let base: String = rest[0].name.chars().map(fit).collect();
        let mut name = base.clone();
        let mut number = 2;
        while before.iter().any(|task| task.name == name) {
            name = format!("{base}-{number}");
            number += 1;
        }
        rest[0].name = name;
    }
}
