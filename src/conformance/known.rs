//! Known answers: of the table, the few cases that tell whether a device can run a certain model.
//!
//! The table takes minutes on a software GPU. A session needs a score of kernels, each in one
//! variant; every one of them is asked once, on inputs that are small and awkward.

use super::caches::{angles, decoding, prompt_then_decode, quarter_turns, shape};
use super::linear::{FLOATS, FloatFormat, embed_of, float_of, packed_matrix, ternary_of};
use super::sample::answers as sampled;
use super::{Check, Inputs, attention, compressed, rows};
use crate::backend::{Backend, MatrixFormat, ModelPlan, TensorFormat};
use crate::delta::{AttentionPolicy, PrefillWindow};
use crate::error::Result;

/// Tokens beyond which the attention of one token is cut over the sequence on every backend.
const LONG: usize = 137;

/// A case that tells whether a device gets one operation right.
pub struct Question<B> {
    /// The operation's name in the table.
    pub operation: &'static str,
    /// What is asked, unlike any other question.
    pub name: String,
    ask: Box<Ask<B>>,
}

type Ask<B> = dyn Fn(&B) -> Result<Vec<Check>> + Send + Sync;

impl<B: Backend> Question<B> {
    pub(crate) fn new(
        operation: &'static str,
        name: impl Into<String>,
        ask: impl Fn(&B) -> Result<Vec<Check>> + Send + Sync + 'static,
    ) -> Self {
        Self { operation, name: format!("{operation}: {}", name.into()), ask: Box::new(ask) }
    }

    /// Runs it.
    ///
    /// # Errors
    /// Where the backend itself fails; wrong results are [`Check`]s that do not pass.
    pub fn ask(&self, backend: &B) -> Result<Vec<Check>> {
        (self.ask)(backend)
    }
}

/// Whatever a model asks of a device but for its attention, in the order of a step: what an
/// operation is tested with was tested before it.
pub fn of_model<B: Backend>(plan: &ModelPlan) -> Vec<Question<B>> {
    let ModelPlan { embedding, body, head, activation, intermediate } = *plan;
    let ternary = body[0] == MatrixFormat::Ternary;
    let projected = if ternary { TensorFormat::Int8 } else { TensorFormat::F32 };
    let mut questions = Vec::new();
    if let Some(format) = float(embedding) {
        questions.push(Question::new("embed", format.0, move |backend: &B| {
            Ok(vec![embed_of(backend, &mut Inputs::new(101), format, (33, 100, 5))?])
        }));
    }
    let mut norms = vec![projected, TensorFormat::F32];
    norms.dedup();
    for out in norms {
        questions.push(Question::new("norm", format!("to {out:?}"), move |backend: &B| {
            rows::norm_of(backend, &mut Inputs::new(102), (257, 5, 0..5), &[out])
        }));
    }
    let mut matrices = body.to_vec();
    // The plan names few formats, and each of them several times.
    matrices.sort_by_key(|format| format.name());
    matrices.dedup();
    let head = float(head).filter(|_| !matrices.contains(&head));
    for format in matrices {
        questions.push(product(format));
    }
    if let Some(format) = head {
        let name = format!("{} weights of a head", format.0);
        questions.push(Question::new("linear_float", name, move |backend: &B| {
            // Nothing is added to logits.
            let (mut inputs, stack): (_, (&[usize], usize)) = (Inputs::new(110), (&[39], 100));
            let mut checks = float_of(backend, &mut inputs, format, stack, &[1])?;
            checks.extend(float_of(backend, &mut inputs, format, stack, &[17])?);
            Ok(checks)
        }));
    }
    let width = if intermediate.is_multiple_of(4) { 260 } else { 257 };
    let normed = if ternary { ", normed" } else { "" };
    let name = format!("{activation:?}, width {width}{normed}, to {projected:?}");
    questions.push(Question::new("gate", name, move |backend: &B| {
        let how = (activation, ternary);
        rows::gate_of(backend, &mut Inputs::new(103), (width, 3), how, &[projected])
    }));
    questions.push(Question::new("sample", "greedy, drawn, and NaN", sampled));
    questions
}

/// Whatever the attention of a session asks of a device.
pub fn of_attention<B: Backend>(head_dim: usize, policy: &AttentionPolicy) -> Vec<Question<B>> {
    // Windows do not change a kernel: with small ones little text is enough to leave them.
    let prefill = PrefillWindow { share: 0.05, ..policy.prefill };
    let policy = AttentionPolicy { sink: 3, window: 1, prefill, ..*policy };
    let name = format!("heads of {head_dim}, {}", format_of(&policy));
    let dense = policy.is_dense();
    let mut questions = vec![Question::new("rope_append", name.clone(), move |backend: &B| {
        let mut inputs = Inputs::new(104);
        let steps = decoding(&[(5, true), (1, true)]);
        let mut case = compressed::case(&mut inputs, shape(4, 2, head_dim), policy, steps);
        case.table = angles(case.tokens() + 1, head_dim);
        Ok(compressed::rope_append_of(backend, &case)?.into())
    })];
    if !dense {
        questions.push(Question::new("encode_keys", name.clone(), move |backend: &B| {
            let steps = decoding(&[(2 * policy.page + 1, false), (policy.page, false)]);
            let mut inputs = Inputs::new(105);
            let case = compressed::case(&mut inputs, shape(2, 2, head_dim), policy, steps);
            Ok(vec![compressed::pages_of(backend, &case)?])
        }));
    }
    questions.push(Question::new("attention", name, move |backend: &B| {
        let mut inputs = Inputs::new(106);
        let prompt = LONG.max(2 * policy.page + 9);
        let steps = prompt_then_decode(&[prompt], &[1, 3]);
        let mut case = compressed::case(&mut inputs, shape(4, 2, head_dim), policy, steps);
        if dense {
            case.table = quarter_turns(case.tokens() + 1, head_dim);
            return Ok(attention::attention_of(backend, case)?.into());
        }
        Ok(compressed::attention_of(backend, case)?.into())
    }));
    questions
}

/// What of a policy decides which kernels run.
fn format_of(policy: &AttentionPolicy) -> String {
    let policy = policy.to_string();
    let runs_alike = ["theta=", "sink=", "alpha=", "shape=", "window="];
    let decides = |word: &&str| !runs_alike.iter().any(|name| word.starts_with(name));
    policy.split(' ').filter(decides).collect::<Vec<_>>().join(" ")
}

/// A float format as the table has it; nothing for ternary matrices.
fn float(format: MatrixFormat) -> Option<FloatFormat> {
    FLOATS.into_iter().find(|float| float.0 == format.name())
}

/// Products of one token, of a few and of many, each with and without a sum: with more rows and tokens than
/// the largest tile of any device has, so that all parts of a tile are seen.
fn product<B: Backend>(format: MatrixFormat) -> Question<B> {
    let name = format!("{} weights", format.name());
    match float(format) {
        Some(format) => Question::new("linear_float", name, move |backend: &B| {
            let stack: (&[usize], usize) = (&[129, 6], 100);
            float_of(backend, &mut Inputs::new(107), format, stack, &[1, 2, 17, 130])
        }),
        None => Question::new("linear_ternary", name, move |backend: &B| {
            let mut inputs = Inputs::new(108);
            let heights = [(340, 0.37), (16, 1.9e-3), (20, 2.3)];
            let stack = heights.map(|(h, scale)| packed_matrix(&mut inputs, h, 96, scale)).to_vec();
            let stack = ("packed with scales [340, 16, 20] x 96".to_owned(), stack);
            ternary_of(backend, &mut inputs, &stack, &[1, 2, 5, 6, 65, 130])
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Activation;
    use crate::reference::Reference;

    #[test]
    fn the_reference_knows_the_answers() {
        let reference = Reference::new();
        let ask = |questions: Vec<Question<Reference>>| {
            for question in questions {
                for check in question.ask(&reference).expect("the reference does not fail") {
                    assert!(check.pass, "{}: {check}", question.name);
                }
            }
        };
        for format in [MatrixFormat::Ternary, MatrixFormat::Q4, MatrixFormat::BF16] {
            let ternary = format == MatrixFormat::Ternary;
            let embedding = if ternary { MatrixFormat::BF16 } else { format };
            ask(of_model(&ModelPlan {
                embedding,
                body: [format; 3],
                head: embedding,
                activation: if ternary { Activation::Relu2 } else { Activation::Silu },
                intermediate: 640,
            }));
        }
        for policy in ["dense", "dense values=int8", "delta", "paper", "keys=int8 page=128"] {
            ask(of_attention(64, &policy.parse().expect("a policy")));
        }
    }
}
