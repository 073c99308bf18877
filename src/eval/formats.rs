//! The fields of rows: our own, those of well-known data sets, and those of harness logs.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::rows::Content;

/// No task has so many choices: each is run with its context.
const MOST_CHOICES: usize = 1000;
/// Bytes of all choices of a row, each with its context: beyond any model's.
const MOST_BYTES: usize = 64 << 20;

/// What "no answer" is called where a row does not say.
const NO_ANSWER: &str = "unanswerable";

type Object = Map<String, Value>;
/// A context and its continuation.
type Pair = (Arc<str>, String);
type Parsed<T> = Result<T, String>;

/// What a line asks; an error names the field.
///
/// | row | fields |
/// |---|---|
/// | text | `text` |
/// | choice | `context`, `choices` (as they follow the context, with a space at their beginning), `label` |
/// | question | `context`, `question`, `answers` (a list of texts, or SQuAD's `{"text": [...]}`); optional `title`, `prompt` (in place of what is made of them), `no_answer` |
/// | passkey | `context` (with the question), `answer`; optional `depth`, `length` |
/// | Winogrande | `sentence`, `option1`, `option2`, `answer` ("1" or "2") |
/// | ARC, OpenBookQA | `question` or `question_stem`, `choices` (`{"text": [...], "label": [...]}`), `answerKey` |
/// | PIQA | `goal`, `sol1`, `sol2`, `label` |
/// | HellaSwag | `ctx_a`, `ctx_b`, `activity_label`, `endings`, `label` |
/// | a sample that lm-evaluation-harness has logged | `doc`, `arguments`, `target` |
///
/// Prompts of the data sets are those of lm-evaluation-harness, with no examples before them.
pub(super) fn content(object: &Object) -> Parsed<Content> {
    let has = |names: &[&str]| names.iter().all(|name| object.contains_key(*name));
    if has(&["arguments", "doc"]) {
        logged_sample(object)
    } else if has(&["sentence", "option1"]) {
        winogrande(object)
    } else if has(&["goal", "sol1"]) {
        piqa(object)
    } else if has(&["endings"]) {
        hellaswag(object)
    } else if has(&["choices", "answerKey"]) {
        science(object)
    } else if has(&["choices"]) {
        choice(object)
    } else if has(&["question", "context"]) {
        question(object)
    } else if has(&["answer", "context"]) {
        passkey(object)
    } else if has(&["text"]) {
        Ok(Content::Text(text(object, "text")?))
    } else {
        let fields: Vec<&str> = object.keys().map(String::as_str).collect();
        Err(format!(
            "has the fields {}, which no known task has: see `deltallm eval --help`",
            fields.join(", ")
        ))
    }
}

fn choice(object: &Object) -> Parsed<Content> {
    let (context, choices) = (shared(object, "context")?, texts(object, "choices")?);
    if choices.len() < 2 {
        return Err(format!("field \"choices\" has {} texts, expected 2 or more", choices.len()));
    }
    let label = index(object, "label", 0, choices.len())?;
    paired(choices.into_iter().map(|choice| (context.clone(), choice)).collect(), label)
}

fn winogrande(object: &Object) -> Parsed<Content> {
    let sentence = text(object, "sentence")?;
    let Some((before, after)) = sentence.split_once('_') else {
        return Err("field \"sentence\" has no _ to be filled".into());
    };
    if after.trim().is_empty() {
        return Err(
            "field \"sentence\" has nothing after its _, by which options are told apart".into()
        );
    }
    let after = format!(" {}", after.trim());
    let pairs = ["option1", "option2"]
        .into_iter()
        .map(|name| Ok((format!("{before}{}", text(object, name)?).into(), after.clone())))
        .collect::<Parsed<Vec<_>>>()?;
    paired(pairs, index(object, "answer", 1, 2)?)
}

fn piqa(object: &Object) -> Parsed<Content> {
    let context: Arc<str> = format!("Question: {}\nAnswer:", text(object, "goal")?).into();
    let pairs = ["sol1", "sol2"]
        .into_iter()
        .map(|name| Ok((context.clone(), format!(" {}", text(object, name)?))))
        .collect::<Parsed<Vec<_>>>()?;
    paired(pairs, index(object, "label", 0, 2)?)
}

fn science(object: &Object) -> Parsed<Content> {
    let name = if object.contains_key("question") { "question" } else { "question_stem" };
    let context: Arc<str> = match name {
        "question" => format!("Question: {}\nAnswer:", text(object, name)?).into(),
        _ => shared(object, name)?,
    };
    let Some(Value::Object(choices)) = object.get("choices") else {
        return Err("field \"choices\" is not an object with \"text\" and \"label\"".into());
    };
    let (labels, key) = (texts(choices, "label")?, text(object, "answerKey")?);
    let Some(label) = labels.iter().position(|label| *label == key) else {
        return Err(format!("field \"answerKey\" is {key:?}, which is not one of {labels:?}"));
    };
    let choices = texts(choices, "text")?;
    paired(choices.iter().map(|choice| (context.clone(), format!(" {choice}"))).collect(), label)
}

fn hellaswag(object: &Object) -> Parsed<Content> {
    let (first, second) = (text(object, "ctx_a")?, text(object, "ctx_b")?);
    let mut letters = second.chars();
    let second: String = match letters.next() {
        Some(c) => c.to_uppercase().chain(letters.flat_map(char::to_lowercase)).collect(),
        None => String::new(),
    };
    let activity = text(object, "activity_label")?;
    let context: Arc<str> = without_brackets(&format!("{activity}: {first} {second}")).into();
    let endings = texts(object, "endings")?;
    let label = index(object, "label", 0, endings.len())?;
    let ending = |ending: &String| (context.clone(), format!(" {}", without_brackets(ending)));
    paired(endings.iter().map(ending).collect(), label)
}

/// WikiHow's texts have remarks in brackets.
fn without_brackets(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let (mut out, mut rest) = (String::new(), text.as_str());
    while let Some(open) = rest.find('[') {
        let Some(close) = rest[open..].find(']') else { break };
        out.push_str(&rest[..open]);
        rest = &rest[open + close + 1..];
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

fn question(object: &Object) -> Parsed<Content> {
    let (context, question) = (text(object, "context")?, text(object, "question")?);
    let prompt = match object.get("prompt") {
        Some(_) => text(object, "prompt")?,
        None => {
            let title = match object.get("title") {
                Some(_) => format!("Title: {}\n\n", text(object, "title")?),
                None => String::new(),
            };
            format!("{title}Background: {context}\n\nQuestion: {question}\n\nAnswer:")
        }
    };
    let no_answer = match object.get("no_answer") {
        Some(_) => text(object, "no_answer")?,
        None => NO_ANSWER.to_owned(),
    };
    Ok(Content::Question { prompt, answers: answers(object)?, no_answer })
}

/// `["..."]`, `{"text": ["..."]}` or `[{"text": "..."}]`.
fn answers(object: &Object) -> Parsed<Vec<String>> {
    match object.get("answers") {
        Some(Value::Object(answers)) => texts(answers, "text"),
        Some(Value::Array(answers)) if answers.iter().all(Value::is_object) => {
            answers.iter().filter_map(Value::as_object).map(|a| text(a, "text")).collect()
        }
        _ => texts(object, "answers"),
    }
}

fn passkey(object: &Object) -> Parsed<Content> {
    let depth = match object.get("depth") {
        None | Some(Value::Null) => None,
        Some(depth) => match depth.as_f64().filter(|depth| (0.0..=1.0).contains(depth)) {
            Some(depth) => Some(depth),
            None => return Err(format!("field \"depth\" is {depth}, expected 0 to 1")),
        },
    };
    let length = match object.get("length") {
        None | Some(Value::Null) => None,
        Some(_) => Some(index(object, "length", 0, usize::MAX)?),
    };
    let (prompt, answer) = (text(object, "context")?, text(object, "answer")?.trim().to_owned());
    if answer.is_empty() {
        return Err("field \"answer\" is empty".into());
    }
    Ok(Content::Passkey { prompt, answer, depth, length })
}

/// What lm-evaluation-harness writes with `--log_samples`: `doc` is the row of the data set,
/// `arguments` are what the model was given, examples and all.
fn logged_sample(object: &Object) -> Parsed<Content> {
    let Some(Value::Object(doc)) = object.get("doc") else {
        return Err("field \"doc\" is not an object".into());
    };
    let arguments = arguments(object)?;
    let pairs: Vec<Pair> = arguments
        .iter()
        .filter_map(|argument| match argument.as_slice() {
            [Value::String(context), Value::String(continuation)] => {
                Some((context.as_str().into(), continuation.clone()))
            }
            _ => None,
        })
        .collect();
    // For mutual information every choice is asked for once more, without its context.
    let half = pairs.len() / 2;
    let again = pairs.len() == arguments.len()
        && half > 1
        && pairs.len().is_multiple_of(2)
        && (0..half).all(|i| pairs[half + i].0.is_empty() && pairs[half + i].1 == pairs[i].1);
    let count = if again { half } else { arguments.len() };
    let (arguments, pairs) = (&arguments[..count], pairs[..pairs.len().min(count)].to_vec());
    // The row of the data set knows best what the target means.
    let known = content(doc);
    match (arguments.first().map(Vec::as_slice), known) {
        (
            Some([Value::String(prompt), Value::Object(_)]),
            Ok(Content::Question { answers, no_answer, .. }),
        ) => Ok(Content::Question { prompt: prompt.clone(), answers, no_answer }),
        (Some([Value::String(_), Value::Object(_)]), _) => {
            Err("field \"doc\" of a generation has no \"context\", \"question\" and \"answers\""
                .into())
        }
        (Some([Value::String(whole)]), _) => Ok(Content::Text(whole.clone())),
        (_, Ok(Content::Choice { label, pairs: expected }))
            if pairs.len() == arguments.len() && pairs.len() == expected.len() =>
        {
            paired(pairs, label)
        }
        _ if pairs.len() > 1 && pairs.len() == arguments.len() => {
            let label = match object.get("target") {
                Some(Value::String(target)) => named_or_numbered(target.trim(), &pairs)?,
                _ => index(object, "target", 0, pairs.len())?,
            };
            paired(pairs, label)
        }
        _ => {
            Err("field \"arguments\" is neither of choices, nor of a generation, nor of a text"
                .into())
        }
    }
}

/// A logged target is the number of a choice, from 0, or its text.
fn named_or_numbered(target: &str, pairs: &[Pair]) -> Parsed<usize> {
    let named = pairs.iter().position(|(_, choice)| choice.trim() == target);
    let numbered = target.parse().ok().filter(|i| *i < pairs.len());
    match (named, numbered) {
        (Some(a), Some(b)) if a != b => Err(format!(
            "field \"target\" is {target:?}: choice {a} has this text, and choice {b} this number"
        )),
        _ => named
            .or(numbered)
            .ok_or_else(|| format!("field \"target\" is {target:?}, which is no choice")),
    }
}

/// Lists of arguments: as such, or as `{"gen_args_0": {"arg_0": ..., "arg_1": ...}}`.
fn arguments(object: &Object) -> Parsed<Vec<Vec<Value>>> {
    let wrong = || "field \"arguments\" is not a list of lists".to_owned();
    let numbered = |object: &Object, prefix: &str| -> Vec<Value> {
        (0..).map_while(|i| object.get(&format!("{prefix}{i}")).cloned()).collect()
    };
    let lists = match object.get("arguments") {
        Some(Value::Array(lists)) => lists.clone(),
        Some(Value::Object(lists)) => numbered(lists, "gen_args_"),
        _ => return Err(wrong()),
    };
    let list = |value: Value| match value {
        Value::Array(list) => Ok(list),
        Value::Object(list) => Ok(numbered(&list, "arg_")),
        Value::String(_) => Ok(vec![value]),
        _ => Err(wrong()),
    };
    lists.into_iter().map(list).collect()
}

fn paired(pairs: Vec<Pair>, label: usize) -> Parsed<Content> {
    if !(2..=MOST_CHOICES).contains(&pairs.len()) {
        return Err(format!("has {} choices, expected 2 to {MOST_CHOICES}", pairs.len()));
    }
    // A context is there once, but becomes tokens with each of its choices.
    let bytes: usize = pairs.iter().map(|(context, choice)| context.len() + choice.len()).sum();
    if bytes > MOST_BYTES {
        return Err(format!(
            "has {bytes} bytes in its choices, each with its context, expected {MOST_BYTES} at most"
        ));
    }
    if let Some(empty) = pairs.iter().position(|(_, choice)| choice.trim().is_empty()) {
        return Err(format!("choice {empty} is empty"));
    }
    Ok(Content::Choice { pairs, label })
}

// ---------------------------------------------------------------------------- fields

fn text(object: &Object, name: &str) -> Parsed<String> {
    match object.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("field {name:?} is {}, expected a text", kind(other))),
        None => Err(format!("field {name:?} is missing")),
    }
}

/// A text that many choices follow.
fn shared(object: &Object, name: &str) -> Parsed<Arc<str>> {
    text(object, name).map(Arc::from)
}

fn texts(object: &Object, name: &str) -> Parsed<Vec<String>> {
    let Some(Value::Array(list)) = object.get(name) else {
        return Err(match object.get(name) {
            Some(other) => format!("field {name:?} is {}, expected a list of texts", kind(other)),
            None => format!("field {name:?} is missing"),
        });
    };
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("field {name:?} holds {}, expected texts", kind(other))),
    };
    list.iter().map(one).collect()
}

/// A whole number from `first` to `first + count - 1`, as a number or as a text; from 0.
fn index(object: &Object, name: &str, first: usize, count: usize) -> Parsed<usize> {
    let Some(value) = object.get(name) else { return Err(format!("field {name:?} is missing")) };
    let number = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number
        .and_then(|number| usize::try_from(number).ok())
        .and_then(|number| number.checked_sub(first))
        .filter(|index| *index < count)
        .ok_or_else(|| match count {
            usize::MAX => format!("field {name:?} is {value}, expected a whole number"),
            _ => format!(
                "field {name:?} is {value}, expected {first} to {}",
                first + count.max(1) - 1
            ),
        })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
