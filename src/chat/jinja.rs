//! Jinja as Hugging Face's transformers runs it (`utils/chat_template_utils.py`): its switches, its
//! functions, and what Python's jinja2 does in another way than minijinja.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
use minijinja_contrib::pycompat;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::{budget, counted, growing};

/// Instructions that a template may take: a conversation of thousands of messages needs less than a
/// tenth. A template that never ends is stopped after about a second. What it makes of memory is
/// bounded by its [`budget`].
const FUEL: u64 = 10_000_000;
/// Calls within calls.
const DEPTH: usize = 200;

/// An environment with one template of this name.
pub fn environment(name: &'static str, source: &str) -> Result<Environment<'static>, Error> {
    let (source, fuel) = counted::source(&without_generation_marks(source), FUEL)?;
    let mut environment = empty()?;
    environment.set_fuel(Some(fuel));
    environment.add_template_owned(name, source)?;
    Ok(environment)
}

fn empty() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_recursion_limit(DEPTH);
    environment.set_formatter(format);
    environment.set_unknown_method_callback(method);
    counted::add_filters(&mut environment);
    growing::add_filters(&mut environment);
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", trim);
    environment.add_function("raise_exception", raise);
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

/// Python writes these three with a capital letter.
fn format(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    budget::spend_written(value)?;
    let text = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => return escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(|_| Error::from(ErrorKind::WriteFailure))
}

/// `trim(characters)`: as in Python, where four control characters are white space too.
fn trim(value: &Value, characters: Option<&str>) -> String {
    // What is not a text becomes one, and what is not there an empty one.
    let text = value.to_string();
    match characters {
        Some(characters) => text.trim_matches(|c| characters.contains(c)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    }
}

fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Python's methods of texts, lists and mappings.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), name, arguments) {
        (Some(text), "strip", []) => Ok(text.trim_matches(is_space).into()),
        (Some(text), "lstrip", []) => Ok(text.trim_start_matches(is_space).into()),
        (Some(text), "rstrip", []) => Ok(text.trim_end_matches(is_space).into()),
        _ => {
            growing::charge_method(value, name, arguments)?;
            pycompat::unknown_method_callback(state, value, name, arguments)
        }
    }
}

fn raise(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// The time here and now, in the words of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, not escaped for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        let message = "tojson(ensure_ascii=true) is not supported";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    options.assert_all_used()?;
    let mut text = budget::Written(String::new());
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(64));
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut text, Spaced)),
    };
    let failed = |message: String| Error::new(ErrorKind::BadSerialization, message);
    written.map_err(|error| failed(error.to_string()))?;
    Ok(text.0)
}

/// `{"a": [1, 2]}` on one line, with Python's spaces.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(out, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// `{% generation %}`, with which transformers marks what the model says, does nothing here.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag[2..].find("%}") else {
            rest = tag;
            break;
        };
        let (inner, after) = (&tag[2..2 + end], &tag[4 + end..]);
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let same = match word {
            "generation" => inner.replace(word, "if true"),
            "endgeneration" => inner.replace(word, "endif"),
            _ => inner.to_owned(),
        };
        out.push_str("{%");
        out.push_str(&same);
        out.push_str("%}");
        rest = after;
    }
    out.push_str(rest);
    out
}
