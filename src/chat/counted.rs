//! A template in which whatever grows is charged to the [`budget`].
//!
//! The engine has no place to ask before it adds two texts. But its filters are ours: one that
//! charges its value and returns it as it is changes nothing else, wherever it stands. So a template
//! is read tag by tag, and such a filter put behind
//!
//! - both sides of `~`, `+` and `*`, and what is looked for by `in`;
//! - the result of each call, filter and slice, and each list and mapping that is written out;
//! - what a filter is given.
//!
//! Text is not moved to other lines: errors name the line that they would.

use minijinja::{Environment, Error, Value};

use super::budget::{refused, spend, spend_held, spend_written};

/// Charges a value as it is held.
const HELD: &str = "|deltallm_held";
/// Charges a value as it is written out.
const WRITTEN: &str = "|deltallm_written";
/// Charges what may be repeated, and refuses to repeat it too often.
const FACTOR: &str = "|deltallm_factor";

/// How often something may be repeated by `*`.
const MAX_FACTOR: i64 = 1000;
/// Brackets within each other; the engine has a limit of its own, at 150.
const MAX_DEPTH: usize = 200;
/// Operators of an expression that stand on each other: the engine calls itself for each of them.
const MAX_HEIGHT: usize = 200;
/// Branches of one `if`, for which it calls itself too.
const MAX_BRANCHES: usize = 200;
/// Bytes that a template may capture of its own text, as of the body of a macro.
const MAX_CAPTURED: u64 = 64 << 20;

/// Filters that look at the elements of a list without writing them out.
const ON_LISTS: [&str; 25] = [
    "length",
    "count",
    "list",
    "first",
    "last",
    "reverse",
    "selectattr",
    "rejectattr",
    "select",
    "reject",
    "items",
    "dictsort",
    "default",
    "d",
    "batch",
    "slice",
    "sort",
    "unique",
    "groupby",
    "min",
    "max",
    "sum",
    "chain",
    "zip",
    "attr",
];

/// Adds the filters that [`source`] uses.
pub fn add_filters(environment: &mut Environment<'_>) {
    fn add(
        environment: &mut Environment<'_>,
        name: &'static str,
        charge: fn(&Value) -> Result<(), Error>,
    ) {
        let filter = move |value: &Value| charge(value).map(|()| value.clone());
        environment.add_filter(name.trim_start_matches('|'), filter);
    }
    add(environment, HELD, spend_held);
    add(environment, WRITTEN, spend_written);
    add(environment, FACTOR, spend_factor);
}

/// Numbers are charged nothing, since they do not grow; a text or a list as often as it may be
/// repeated.
fn spend_factor(value: &Value) -> Result<(), Error> {
    if f64::try_from(value.clone()).is_ok_and(|number| number > MAX_FACTOR as f64) {
        return Err(refused(format!("repeats something more than {MAX_FACTOR} times")));
    }
    match (value.as_str(), value.is_number(), value.len()) {
        (Some(text), ..) => spend(text.len().saturating_mul(MAX_FACTOR as usize)),
        (None, false, Some(length)) => spend(length.saturating_mul(8 * MAX_FACTOR as usize)),
        _ => Ok(()),
    }
}

/// A template with its charges, and the instructions that it may take of `fuel`.
///
/// # Errors
/// Brackets without end; a product of three, of which the first two have no name to be charged by.
pub fn source(source: &str, fuel: u64) -> Result<(String, u64), Error> {
    let mut out = String::with_capacity(2 * source.len());
    let (mut rest, mut captures, mut longest, mut branches) = (source, 0u64, 0, 0);
    while let Some(start) = next_tag(rest) {
        if captures > 0 {
            longest = longest.max(start);
        }
        let (text, tag) = rest.split_at(start);
        out.push_str(text);
        let end = match &tag[..2] {
            "{#" => tag.find("#}").map(|end| end + 2),
            "{%" if raw_tag(&tag[2..], "raw").is_some() => end_of_raw(tag),
            _ => {
                let block = tag.starts_with("{%");
                let tokens = tokens(&tag[2..], block);
                if let Some(end) = tokens.end {
                    let mut words = Tag { list: &tokens.list, at: 0, charges: Vec::new() };
                    // A new `if` within may be forgotten by the outer: it is for too many in a row.
                    match words.kind(0) {
                        Some(Kind::Name("elif")) if block => branches += 1,
                        Some(Kind::Name("if" | "endif")) if block => branches = 0,
                        _ => {}
                    }
                    if branches > MAX_BRANCHES {
                        return Err(refused(format!("has more than {MAX_BRANCHES} branches")));
                    }
                    match if block { words.statement()? } else { words.expression()? } {
                        Capture::Begins => captures += 1,
                        Capture::Ends => captures = captures.saturating_sub(1),
                        Capture::None => {}
                    }
                    push_charged(&mut out, rest, start, end, words.charges);
                    rest = &rest[start + 2 + end..];
                    continue;
                }
                None
            }
        };
        // A tag without an end: the engine says so.
        let end = end.unwrap_or(tag.len());
        if captures > 0 {
            longest = longest.max(end);
        }
        out.push_str(&tag[..end]);
        rest = &tag[end..];
    }
    out.push_str(rest);
    // Text that is written as it stands is not charged: each instruction may write the longest.
    let fuel = if longest > 0 { fuel.min(MAX_CAPTURED / longest as u64) } else { fuel };
    Ok((out, fuel))
}

/// Where the next tag opens.
fn next_tag(text: &str) -> Option<usize> {
    let opens = |at: &usize| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
    text.match_indices('{').map(|(at, _)| at).find(opens)
}

/// Appends a tag of `rest` with its charges.
fn push_charged(
    out: &mut String,
    rest: &str,
    start: usize,
    end: usize,
    mut charges: Vec<(usize, &'static str)>,
) {
    charges.sort_by_key(|(at, _)| *at);
    let inner = start + 2;
    out.push_str(&rest[start..inner]);
    let mut written = 0;
    for (at, filter) in charges {
        out.push_str(&rest[inner + written..inner + at]);
        out.push_str(filter);
        written = at;
    }
    out.push_str(&rest[inner + written..inner + end]);
}

/// The length of a tag of one word, from behind its opening on.
fn raw_tag(tag: &str, name: &str) -> Option<usize> {
    let inner = tag.strip_prefix(['-', '+']).unwrap_or(tag).trim_ascii_start();
    let after = inner.strip_prefix(name)?.trim_ascii_start();
    let after = after.strip_prefix(['-', '+']).unwrap_or(after).strip_prefix("%}")?;
    Some(tag.len() - after.len())
}

/// The length of `{% raw %}...{% endraw %}`.
fn end_of_raw(tag: &str) -> Option<usize> {
    let mut at = 2;
    while let Some(next) = tag[at..].find("{%") {
        at += next + 2;
        if let Some(length) = raw_tag(&tag[at..], "endraw") {
            return Some(at + length);
        }
    }
    None
}

/// A word of a tag and where it ends.
#[derive(Clone, Copy, Debug)]
struct Token<'a> {
    kind: Kind<'a>,
    end: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind<'a> {
    Name(&'a str),
    /// A text or a number.
    Literal,
    /// Whatever else, of one or two characters.
    Sign(&'a str),
}

/// The words of a tag, and where it ends, its closing included.
struct Tokens<'a> {
    list: Vec<Token<'a>>,
    end: Option<usize>,
}

/// Reads a tag from behind its opening on, as the engine does.
fn tokens(tag: &str, block: bool) -> Tokens<'_> {
    let close = if block { "%}" } else { "}}" };
    let mut list = Vec::new();
    let (mut at, mut depth) = (0, 0i64);
    // The sign of white space control.
    if tag.starts_with(['-', '+']) {
        at = 1;
    }
    while at < tag.len() {
        let rest = &tag[at..];
        let first = rest.as_bytes()[0];
        if first.is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if depth == 0 {
            let closing = rest.strip_prefix(['-', '+']).unwrap_or(rest);
            if closing.starts_with(close) || rest.starts_with(close) {
                let skipped = if rest.starts_with(close) { 0 } else { 1 };
                return Tokens { list, end: Some(at + skipped + 2) };
            }
        }
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let length_of =
            |inside: &dyn Fn(char) -> bool| rest.find(|c| !inside(c)).unwrap_or(rest.len()).max(1);
        let (kind, length) = match first {
            b'\'' | b'"' => (Kind::Literal, text_length(rest)),
            b'0'..=b'9' => {
                let whole = length_of(&word);
                // The fraction, where one follows.
                let fraction = rest[whole..]
                    .strip_prefix('.')
                    .filter(|fraction| fraction.starts_with(|c: char| c.is_ascii_digit()));
                let fraction = fraction.map_or(0, |fraction| {
                    1 + fraction.find(|c| !word(c)).unwrap_or(fraction.len())
                });
                (Kind::Literal, whole + fraction)
            }
            _ if rest.starts_with(word) => {
                let length = length_of(&word);
                (Kind::Name(&rest[..length]), length)
            }
            _ => {
                let two = ["//", "**", "==", "!=", ">=", "<="];
                let length = match two.iter().any(|two| rest.starts_with(two)) {
                    true => 2,
                    false => rest.chars().next().map_or(1, char::len_utf8),
                };
                depth += match first {
                    b'(' | b'[' | b'{' => 1,
                    b')' | b']' | b'}' => -1,
                    _ => 0,
                };
                (Kind::Sign(&rest[..length]), length)
            }
        };
        at += length;
        list.push(Token { kind, end: at });
    }
    Tokens { list, end: None }
}

/// The length of a text with its quotation marks.
fn text_length(rest: &str) -> usize {
    let mark = rest.as_bytes()[0];
    let mut escaped = false;
    for (at, byte) in rest.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            byte if byte == mark => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// What a statement does to what is written after it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Capture {
    None,
    Begins,
    Ends,
}

/// A tag that is read for the places of its charges.
struct Tag<'a> {
    list: &'a [Token<'a>],
    at: usize,
    /// Byte offsets in the tag, and the filter that goes there.
    charges: Vec<(usize, &'static str)>,
}

/// How an operand ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    /// With a name, a text, a number, an element.
    Plain,
    /// With what was made on the spot: a call's result, a slice, what a filter returns.
    Made,
    /// With a list or a mapping that is written out, or what a function returns.
    Whole,
}

impl<'a> Tag<'a> {
    fn kind(&self, at: usize) -> Option<Kind<'a>> {
        self.list.get(at).map(|token| token.kind)
    }

    fn is_sign(&self, at: usize, signs: &[&str]) -> bool {
        matches!(self.kind(at), Some(Kind::Sign(sign)) if signs.contains(&sign))
    }

    fn is_name(&self, at: usize, name: &str) -> bool {
        self.kind(at) == Some(Kind::Name(name))
    }

    /// Reads what stands between `{{` and `}}`.
    fn expression(&mut self) -> Result<Capture, Error> {
        self.sequence(false, 0)?;
        Ok(Capture::None)
    }

    /// Reads a statement. Where it is about a call, nothing is put behind that call.
    fn statement(&mut self) -> Result<Capture, Error> {
        let Some(Kind::Name(name)) = self.kind(0) else { return self.expression() };
        let bare = ["macro", "call", "do", "filter", "block"].contains(&name);
        let capture = match name {
            "macro" | "call" | "filter" => Capture::Begins,
            "set" if !self.assigns() => Capture::Begins,
            "endmacro" | "endcall" | "endfilter" | "endset" => Capture::Ends,
            _ => Capture::None,
        };
        // Up to the first `in` of a loop stand names only.
        let target = self.list.iter().position(|token| token.kind == Kind::Name("in"));
        self.at = match target.filter(|_| name == "for") {
            Some(at) => at + 1,
            None => 1,
        };
        self.sequence(bare, 0)?;
        Ok(capture)
    }

    /// Whether there is a `=` outside of brackets.
    fn assigns(&self) -> bool {
        let mut depth = 0;
        self.list.iter().any(|token| {
            match token.kind {
                Kind::Sign("(" | "[" | "{") => depth += 1,
                Kind::Sign(")" | "]" | "}") => depth -= 1,
                _ => {}
            }
            depth == 0 && token.kind == Kind::Sign("=")
        })
    }

    /// Reads operands and what stands between them, up to a closing bracket or the end; returns how
    /// many operators stand on each other at most.
    fn sequence(&mut self, bare: bool, depth: usize) -> Result<usize, Error> {
        if depth > MAX_DEPTH {
            return Err(refused("nests brackets too deep"));
        }
        // Of a product of three, the first two have no place for a charge.
        let (mut products, mut follows_operand) = (0, false);
        let (mut height, mut highest) = (0, 0);
        while let Some(kind) = self.kind(self.at) {
            let is_operand = match kind {
                Kind::Sign(")" | "]" | "}") => break,
                Kind::Sign("(" | "[" | "{") | Kind::Literal => true,
                Kind::Sign(_) => false,
                Kind::Name("and" | "or" | "not" | "in" | "is" | "if" | "else") => false,
                Kind::Name(_) => true,
            };
            if is_operand {
                height = self.operand(bare, depth)?.max(height + usize::from(follows_operand));
            } else {
                match kind {
                    Kind::Sign("*") => products += 1,
                    Kind::Sign("/" | "//" | "%" | ".") => {}
                    Kind::Sign("-") if !follows_operand => {}
                    // The test's name; what follows it is an operand again, or ends this one.
                    Kind::Name("is") => {
                        self.at += 1 + usize::from(self.is_name(self.at + 1, "not"));
                        products = 0;
                    }
                    _ => products = 0,
                }
                if products > 1 {
                    return Err(refused("has a product of three: put two of them in brackets"));
                }
                height = if matches!(kind, Kind::Sign("," | ":")) { 0 } else { height + 1 };
                self.at += 1;
            }
            highest = highest.max(height);
            if highest > MAX_HEIGHT {
                return Err(refused(format!("has an expression of over {MAX_HEIGHT} operators")));
            }
            follows_operand = is_operand;
        }
        Ok(highest + 1)
    }

    /// Reads a name, literal or bracket with all that belongs to it, and charges it as it ends;
    /// returns its height.
    fn operand(&mut self, bare: bool, depth: usize) -> Result<usize, Error> {
        let first = self.at;
        let (mut height, mut last) = match self.kind(first) {
            Some(Kind::Sign("[" | "{")) => (self.brackets(depth)?, Last::Whole),
            Some(Kind::Sign(_)) => (self.brackets(depth)?, Last::Plain),
            _ => {
                self.at += 1;
                (0, Last::Plain)
            }
        };
        loop {
            if self.is_sign(self.at, &["."]) {
                self.at += 2;
                last = Last::Plain;
            } else if self.is_sign(self.at, &["["]) {
                let from = self.at;
                height = self.brackets(depth)?.max(height);
                last = if self.is_slice(from) { Last::Made } else { Last::Plain };
            } else if self.is_sign(self.at, &["("]) {
                let named = self.at == first + 1;
                // The engine knows the first two by their place; the third has its own bound.
                let known = ["loop", "super", "range"];
                let special = named && known.iter().any(|name| self.is_name(first, name));
                height = self.brackets(depth)?.max(height);
                last = match (special, named) {
                    (true, _) => Last::Plain,
                    (false, true) => Last::Whole,
                    (false, false) => Last::Made,
                };
            } else if self.is_sign(self.at, &["|"]) {
                let Some(Kind::Name(filter)) = self.kind(self.at + 1) else { break };
                if !bare {
                    let written = !ON_LISTS.contains(&filter);
                    self.charge(if written { WRITTEN } else { HELD });
                }
                self.at += 2;
                if self.is_sign(self.at, &["("]) {
                    height = self.brackets(depth)?.max(height);
                }
                last = Last::Made;
            } else {
                break;
            }
            height += 1;
        }
        if bare {
            return Ok(height);
        }
        match last {
            Last::Plain => {}
            Last::Made => self.charge(HELD),
            Last::Whole => self.charge(WRITTEN),
        }
        let before = |signs| first > 0 && self.is_sign(first - 1, signs);
        let beside = |signs| before(signs) || self.is_sign(self.at, signs);
        let (times, joined, added) = (beside(&["*"]), beside(&["~"]), beside(&["+"]));
        let sought = self.is_name(self.at, "in")
            || (self.is_name(self.at, "not") && self.is_name(self.at + 1, "in"));
        if times {
            self.charge(FACTOR);
        }
        if joined || sought {
            self.charge(WRITTEN);
        } else if added {
            self.charge(HELD);
        }
        Ok(height)
    }

    /// Puts a filter behind the word before this one.
    fn charge(&mut self, filter: &'static str) {
        if let Some(token) = self.at.checked_sub(1).and_then(|at| self.list.get(at)) {
            self.charges.push((token.end, filter));
        }
    }

    /// Reads brackets and what is in them, which has a height.
    fn brackets(&mut self, depth: usize) -> Result<usize, Error> {
        self.at += 1;
        let height = self.sequence(false, depth + 1)?;
        self.at += 1;
        Ok(height)
    }

    /// Whether the brackets from here to before this word hold a colon of their own.
    fn is_slice(&self, from: usize) -> bool {
        let mut depth = 0;
        self.list[from..self.at.min(self.list.len())].iter().any(|token| {
            match token.kind {
                Kind::Sign("(" | "[" | "{") => depth += 1,
                Kind::Sign(")" | "]" | "}") => depth -= 1,
                _ => {}
            }
            depth == 1 && token.kind == Kind::Sign(":")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With `h`, `w` and `f` for the filters.
    fn charged(text: &str) -> String {
        let (out, _) = source(text, 1).expect(text);
        out.replace(HELD, "|h").replace(WRITTEN, "|w").replace(FACTOR, "|f")
    }

    #[test]
    fn what_grows_is_charged_and_nothing_else_is_touched() {
        for same in [
            "",
            "{{ a }}",
            "{{ a.b[0]['c'] }}",
            "{% if a == b and c is defined %}x{% endif %}",
            "{% for a, b in c %}{{ loop(c) }}{% endfor %}",
            "{% for a in range(3) %}{% endfor %}",
            "{% macro f(a, b=1) %}{% endmacro %}",
            "{% call f(a) %}{% endcall %}",
            "{% set a.b = c %}",
            "{# {{ a ~ b }} #}",
            "{% raw %}{{ a ~ b }}{% endraw %}",
            "{%- raw -%}{{ f(a) }}{%- endraw -%}",
            "{{ '}} {% ~' }}",
            "{{- \"\\\"~\" -}}",
            "{{ a - b / c % d }}",
            "{{ a ~ b",
            "a }} b %} c",
        ] {
            assert_eq!(charged(same), same);
        }
        for (text, expected) in [
            ("{{ a ~ b }}", "{{ a|w ~ b|w }}"),
            ("{{- a + b.c -}}", "{{- a|h + b.c|h -}}"),
            ("{{ a ~ b[0] ~ 'c' }}", "{{ a|w ~ b[0]|w ~ 'c'|w }}"),
            ("{{ 'a' * n }}", "{{ 'a'|f * n|f }}"),
            ("{{ f(a) }}", "{{ f(a)|w }}"),
            ("{{ a.f(b ~ c) }}", "{{ a.f(b|w ~ c|w)|h }}"),
            ("{{ a | trim }}", "{{ a|w | trim|h }}"),
            ("{{ a|list|join(', ') }}", "{{ a|h|list|w|join(', ')|h }}"),
            ("{{ a[1:] }}", "{{ a[1:]|h }}"),
            ("{{ a[b[1:][0]] }}", "{{ a[b[1:][0]] }}"),
            ("{{ [a, {'b': c}] }}", "{{ [a, {'b': c}|w]|w }}"),
            ("{% for a in b.items() %}", "{% for a in b.items()|h %}"),
            ("{% for a in b if c in d %}", "{% for a in b if c|w in d %}"),
            ("{% if a not in b %}", "{% if a|w not in b %}"),
            ("{% set a = b ~ c %}", "{% set a = b|w ~ c|w %}"),
            ("{% set a.b = [a.b] %}", "{% set a.b = [a.b]|w %}"),
            ("{% set a = b is string and c %}", "{% set a = b is string and c %}"),
            ("{% macro f(a, b=a ~ a) %}", "{% macro f(a, b=a|w ~ a|w) %}"),
            ("{% call f(a ~ b) %}", "{% call f(a|w ~ b|w) %}"),
            ("{% do f(a + b) %}", "{% do f(a|h + b|h) %}"),
            ("{% filter replace('a', b ~ c) %}", "{% filter replace('a', b|w ~ c|w) %}"),
            ("{{ (a ~ b) ~ c }}", "{{ (a|w ~ b|w)|w ~ c|w }}"),
            ("{{ a if b else c ~ d }}", "{{ a if b else c|w ~ d|w }}"),
            ("{{ f(a=b ~ c) }}", "{{ f(a=b|w ~ c|w)|w }}"),
            ("{{ 1.5 + x }}", "{{ 1.5|h + x|h }}"),
        ] {
            assert_eq!(charged(text), expected, "{text}");
        }
        for refused in ["{{ a * b * c }}".to_owned(), format!("{{{{ {}", "(".repeat(1000)) + " }}"]
        {
            assert!(source(&refused, 1).is_err() || charged(&refused) == refused, "{refused:.30}");
        }
        assert!(source("{{ a * b * c }}", 1).is_err());
        let list = format!("{{{{ [{}] }}}}", "{'a': 'b'}, ".repeat(1000));
        assert!(source(&list, 1).is_ok(), "a long list is not high");
    }

    #[test]
    fn captured_text_takes_fuel() {
        let fuel = |text: &str| source(text, 1 << 40).expect(text).1;
        let long = "word ".repeat(1000);
        assert_eq!(fuel(&long), 1 << 40);
        assert_eq!(fuel(&format!("{long}{{% set a = 1 %}}{long}")), 1 << 40);
        for (open, close) in
            [("set a", "endset"), ("macro f()", "endmacro"), ("filter f", "endfilter")]
        {
            let text = format!("{{% {open} %}}{long}{{% {close} %}}{long}{long}");
            assert_eq!(fuel(&text), MAX_CAPTURED / 5000, "{open}");
        }
    }
}
