//! Filters and methods that make more than they are given: charged before they do.

use minijinja::value::{Kwargs, Rest, StringInput, Value, ValueOrKwargs};
use minijinja::{Environment, Error, State, filters, tests};

use super::budget::{refused, spend, spend_written};

/// How far a text may be indented, how often a list be cut, and how wide a number be.
const MAX_COUNT: usize = 1000;
/// What a piece of a text takes beside it.
const PIECE: usize = 32;

/// Puts them in the place of the engine's own, which they call.
pub fn add_filters(environment: &mut Environment<'_>) {
    environment.add_filter("replace", replace);
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("batch", batch);
    environment.add_filter("slice", slice);
    environment.add_filter("format", format);
    environment.add_filter("split", split);
    environment.add_test("in", is_in);
    // They write out whatever there is, and no model's template has them.
    environment.remove_filter("pprint");
    environment.remove_global("debug");
}

/// Charges what a method of a text is about to make.
pub fn charge_method(value: &Value, name: &str, arguments: &[Value]) -> Result<(), Error> {
    let Some(text) = value.as_str() else { return Ok(()) };
    let argument = |index: usize| arguments.get(index).and_then(Value::as_str);
    match name {
        "replace" => match (argument(0), argument(1)) {
            (Some(from), Some(to)) => spend_replaced(text, from, to),
            _ => Ok(()),
        },
        "join" => match arguments.first() {
            Some(list) => spend_joined(list, text),
            None => Ok(()),
        },
        "format" => {
            check_widths(text)?;
            arguments.iter().try_for_each(spend_written)
        }
        "split" | "splitlines" => spend_pieces(text, argument(0)),
        _ => Ok(()),
    }
}

fn spend_replaced(text: &str, from: &str, to: &str) -> Result<(), Error> {
    spend(text.matches(from).count().saturating_mul(to.len()))
}

fn spend_joined(list: &Value, between: &str) -> Result<(), Error> {
    spend(list.len().unwrap_or(0).saturating_mul(between.len()))?;
    spend_written(list)
}

fn spend_pieces(text: &str, between: Option<&str>) -> Result<(), Error> {
    let count = match between {
        Some(between) => text.matches(between).count(),
        None => text.split_ascii_whitespace().count() + text.lines().count(),
    };
    spend(count.saturating_mul(PIECE))
}

/// Refuses a format in which something is as wide as a number of many digits says.
fn check_widths(format: &str) -> Result<(), Error> {
    let numbers = format.split(|c: char| !c.is_ascii_digit());
    if numbers.into_iter().any(|digits| digits.trim_start_matches('0').len() > 3) {
        return Err(refused(format!("formats something wider than {MAX_COUNT}")));
    }
    Ok(())
}

fn check_count(count: usize) -> Result<(), Error> {
    if count > MAX_COUNT {
        return Err(refused(format!("takes something {count} times, above {MAX_COUNT}")));
    }
    Ok(())
}

fn replace(
    state: &mut State<'_, '_>,
    value: StringInput<'_>,
    from: StringInput<'_>,
    to: StringInput<'_>,
) -> Result<Value, Error> {
    spend_replaced(value.as_str(), from.as_str(), to.as_str())?;
    filters::replace(state, value, from, to)
}

fn join(
    state: &mut State<'_, '_>,
    value: &Value,
    joiner: Option<StringInput<'_>>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<StringInput<'_>> = kwargs.get("d")?;
    let between = joiner.as_ref().or(named.as_ref()).map_or("", StringInput::as_str);
    spend_joined(value, between)?;
    filters::join(state, value, joiner, attribute, kwargs)
}

fn indent(
    value: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let wide = match width {
        Some(width) => width,
        None => kwargs.get::<Option<usize>>("width")?.unwrap_or(4),
    };
    check_count(wide)?;
    spend(value.as_str().split('\n').count().saturating_mul(wide))?;
    filters::indent(value, width, first, blank, kwargs)
}

fn batch(
    state: &State<'_, '_>,
    value: Value,
    count: usize,
    fill: Option<Value>,
) -> Result<Value, Error> {
    check_count(count)?;
    filters::batch(state, value, count, fill)
}

fn slice(
    state: &State<'_, '_>,
    value: Value,
    count: usize,
    fill: Option<Value>,
) -> Result<Value, Error> {
    check_count(count)?;
    filters::slice(state, value, count, fill)
}

fn format(
    state: &mut State<'_, '_>,
    value: &Value,
    arguments: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    check_widths(value.as_str().unwrap_or_default())?;
    // A width may be an argument too.
    if value.as_str().is_some_and(|format| format.contains('*')) {
        let counts = arguments.iter().filter_map(|argument| argument.as_usize());
        counts.into_iter().try_for_each(check_count)?;
    }
    arguments.iter().try_for_each(|argument| spend_written(argument))?;
    filters::format(state, value, arguments)
}

fn split(value: &Value, between: Option<&str>, most: Option<i64>) -> Result<Value, Error> {
    spend_pieces(value.as_str().unwrap_or_default(), between)?;
    filters::split(value, between.map(Into::into), most)
}

fn is_in(state: &State<'_, '_>, value: &Value, other: &Value) -> Result<bool, Error> {
    // In a text it is looked for as a text.
    if other.as_str().is_some() {
        spend_written(value)?;
    }
    tests::is_in(state, value, other)
}
