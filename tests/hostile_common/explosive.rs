//! Tokenizers and chat templates that are written to do harm: they contradict themselves, never end, or
//! make gigabytes of a few bytes.

use serde_json::{Value, json};

use super::spoil::Random;

/// Tokenizers whose parts contradict each other, and those of other kinds than ours.
pub fn inconsistent_tokenizers(valid: &Value) -> Vec<(&'static str, Value)> {
    let changed = |part: &str, value: Value| {
        let mut tokenizer = valid.clone();
        tokenizer[part] = value;
        tokenizer
    };
    let of_model = |change: &dyn Fn(&mut Value)| {
        let mut tokenizer = valid.clone();
        change(&mut tokenizer["model"]);
        tokenizer
    };
    let added = |id: u64, content: &str| {
        json!([{ "id": id, "content": content, "single_word": false, "lstrip": false,
                 "rstrip": false, "normalized": false, "special": true }])
    };
    let special = |ids: Value| {
        json!({ "type": "TemplateProcessing", "pair": [],
                "single": [{ "SpecialToken": { "id": "x", "type_id": 0 } },
                           { "Sequence": { "id": "A", "type_id": 0 } }],
                "special_tokens": { "x": { "id": "x", "ids": ids, "tokens": ["x"] } } })
    };
    let split = |pattern: &str| {
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated",
                "invert": false })
    };
    vec![
        ("two tokens of one id", of_model(&|m| m["vocab"]["!"] = json!(3))),
        ("a gap", of_model(&|m| m["vocab"]["!"] = json!(299))),
        ("an id beyond the embedding", of_model(&|m| m["vocab"]["!"] = json!(300))),
        ("an id of 32 bits", of_model(&|m| m["vocab"]["!"] = json!(u32::MAX))),
        ("no vocabulary", of_model(&|m| m["vocab"] = json!({}))),
        ("a merge of nothing", of_model(&|m| m["merges"] = json!([["", ""]]))),
        ("a merge of strangers", of_model(&|m| m["merges"] = json!([["zz", "yy"]]))),
        ("half a merge", of_model(&|m| m["merges"] = json!(["a"]))),
        ("an unknown token that is not there", of_model(&|m| m["unk_token"] = json!("nowhere"))),
        ("all tokens dropped", of_model(&|m| m["dropout"] = json!(1e30))),
        ("a prefix", of_model(&|m| m["continuing_subword_prefix"] = json!("aaaaaaaaaa"))),
        (
            "a prefix that cuts letters in two",
            of_model(&|m| {
                m["continuing_subword_prefix"] = json!("a");
                m["vocab"]["\u{e9}"] = json!(290);
                m["merges"] = json!([["a", "\u{e9}"]]);
            }),
        ),
        ("bytes that are not there", of_model(&|m| m["byte_fallback"] = json!(true))),
        ("a Unigram of nothing", changed("model", json!({ "type": "Unigram", "vocab": [] }))),
        (
            "a Unigram without its unknown token",
            changed("model", json!({ "type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]] })),
        ),
        (
            "a Unigram of infinities",
            changed(
                "model",
                json!({ "type": "Unigram", "unk_id": 0, "vocab": [["a", -1e308], ["", 1e308]] }),
            ),
        ),
        (
            "a WordPiece of nothing",
            changed(
                "model",
                json!({ "type": "WordPiece", "vocab": {}, "unk_token": "?",
                        "continuing_subword_prefix": "", "max_input_chars_per_word": 0 }),
            ),
        ),
        (
            "words",
            changed("model", json!({ "type": "WordLevel", "vocab": { "a": 7 }, "unk_token": "b" })),
        ),
        ("an added token beyond the embedding", changed("added_tokens", added(4000, "<x>"))),
        ("an added token of another id", changed("added_tokens", added(5, "!"))),
        ("an empty added token", changed("added_tokens", added(0, ""))),
        ("a special token beyond the embedding", changed("post_processor", special(json!([9999])))),
        ("a special token of no id", changed("post_processor", special(json!([])))),
        (
            "a template of the text that is not there",
            changed(
                "post_processor",
                json!({ "type": "TemplateProcessing", "pair": [], "special_tokens": {},
                        "single": [{ "Sequence": { "id": "B", "type_id": 0 } }] }),
            ),
        ),
        ("a class without end", changed("pre_tokenizer", split("[a"))),
        ("a pattern that looks back and forth", changed("pre_tokenizer", split("(a*)*\\1b(?=c)$"))),
        ("a pattern of millions", changed("pre_tokenizer", split("((a{999}){999}){999}"))),
        ("a deep pattern", changed("pre_tokenizer", split(&"(".repeat(9999)))),
        ("an empty pattern", changed("pre_tokenizer", split(""))),
        (
            "pieces of no length",
            changed("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        ),
        (
            "a decoder that cuts more than there is",
            changed("decoder", json!({ "type": "Strip", "content": "H", "start": 0, "stop": 9 })),
        ),
        (
            "a normaliser that is not base64",
            changed("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "!" })),
        ),
        (
            "a normaliser whose table lies",
            changed(
                "normalizer",
                json!({ "type": "Precompiled", "precompiled_charsmap": "/////w==" }),
            ),
        ),
        (
            "truncation to less than nothing",
            changed(
                "truncation",
                json!({ "max_length": 0,
            "strategy": "LongestFirst", "stride": 9, "direction": "Right" }),
            ),
        ),
        (
            "padding to no multiple",
            changed(
                "padding",
                json!({ "strategy": { "Fixed": 1u64 << 40 },
            "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "x" }),
            ),
        ),
    ]
}

/// Tokenizers that make a gigabyte of a letter.
pub fn explosive_tokenizers(valid: &Value) -> Vec<(&'static str, Value)> {
    let changed = |part: &str, value: Value| {
        let mut tokenizer = valid.clone();
        tokenizer[part] = value;
        tokenizer
    };
    let sequence = |list: &str, part: Value, count: usize| json!({ "type": "Sequence", list: vec![part; count] });
    let double = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
    let between = json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "aaaa" });
    let twice = json!({ "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{ "Sequence": { "id": "A", "type_id": 0 } },
                   { "Sequence": { "id": "A", "type_id": 0 } }] });
    let piece = json!({ "SpecialToken": { "id": "x", "type_id": 0 } });
    let many = json!({ "type": "TemplateProcessing", "pair": [],
        "single": vec![piece; 20_000],
        "special_tokens": { "x": { "id": "x", "ids": vec![0; 20_000], "tokens": vec!["x"; 20_000] } } });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": false });
    let chain = |list: &str| {
        let inner = json!({ "type": "Sequence", list: [] });
        (0..40).fold(inner, |inner, _| json!({ "type": "Sequence", list: [inner] }))
    };
    vec![
        (
            "letters doubled forty times",
            changed("normalizer", sequence("normalizers", double.clone(), 40)),
        ),
        ("letters between letters", changed("normalizer", sequence("normalizers", between, 12))),
        ("bytes of bytes of bytes", changed("pre_tokenizer", sequence("pretokenizers", bytes, 40))),
        (
            "the text twice, forty times",
            changed("post_processor", sequence("processors", twice, 40)),
        ),
        ("twenty thousand times as many tokens", changed("post_processor", many)),
        (
            "a letter's text doubled forty times",
            changed("decoder", sequence("decoders", double, 40)),
        ),
        ("sequences in sequences to normalise", changed("normalizer", chain("normalizers"))),
        ("sequences in sequences to split", changed("pre_tokenizer", chain("pretokenizers"))),
        ("sequences in sequences to decode", changed("decoder", chain("decoders"))),
    ]
}

/// Templates that never end, or that take all memory there is.
pub const TEMPLATES: [&str; 27] = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'chat_template' %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'x' * 99999999 }}",
    "{{ 'x' * 99999 * 999 }}",
    "{{ ('x' * 999) * 999 * 90 }}",
    "{{ [1] * 99999999 }}",
    "{{ ([1] * 99999999) | list }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xxxx') %}{% for i in range(99999) %}{% set ns.x = 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' ~ ns.x %}{% endfor %}",
    "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ f('x', 99) }}",
    "{% macro f(x, y=x ~ x) %}{{ f(y) }}{% endmacro %}{{ f('xxxxxxxx') }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}{% endfor %}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ (ns.x ~ '') | length }}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | join('') }}",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('x', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}{% endfor %}",
    "{{ 'a' | indent(99999999999) }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ [1] | batch(99999999999, 'x') | list }}",
    "{{ [1] | slice(99999999999, 'x') | list }}",
];

/// A template that makes a text and a list of themselves, again and again, in some way.
pub fn growing_template(random: &mut Random) -> String {
    let (text, list) = (text(random, 3), list(random, 3));
    format!(
        "{{% set ns = namespace(s='xy', l=['x', 'y']) %}}{{% macro f(a) %}}{{{{ a }}}}y{{% endmacro %}}\
         {{% for i in range(60) %}}{{% set ns.s = {text} %}}{{% set ns.l = {list} %}}{{% endfor %}}\
         {{{{ ns.s | length }}}} {{{{ ns.l | length }}}}"
    )
}

/// An expression of a text.
fn text(random: &mut Random, depth: usize) -> String {
    if depth == 0 {
        return (*random.pick(&["ns.s", "ns.s", "'xy'", "ns.l[0] | string"])).to_owned();
    }
    let depth = depth - 1;
    let (one, other) = (text(random, depth), text(random, depth));
    match random.below(16) {
        0 | 1 => format!("({one} ~ {other})"),
        2 => format!("({one} + {other})"),
        3 => format!("({one} * 3)"),
        4 => format!("({one}) | replace('x', {other})"),
        5 => format!("({one}).replace('y', {other})"),
        6 => format!("({}) | join({other})", list(random, depth)),
        7 => format!("({one}).join({})", list(random, depth)),
        8 => format!("({}) | tojson", list(random, depth)),
        9 => format!("({}) | string", list(random, depth)),
        10 => format!("f({one})"),
        11 => format!("(({one}) | upper | lower)[0:]"),
        12 => format!("({one} if i is odd else {other})"),
        13 => format!("'%s{{}}'.format({one}) | format({other})"),
        14 => format!("({one}) | indent(2) | trim"),
        _ => format!("({one} ~ {})", list(random, depth)),
    }
}

/// An expression of a list.
fn list(random: &mut Random, depth: usize) -> String {
    if depth == 0 {
        return (*random.pick(&["ns.l", "ns.l", "['x']", "[ns.s]"])).to_owned();
    }
    let depth = depth - 1;
    let one = list(random, depth);
    match random.below(12) {
        0 | 1 => format!("({one} + {})", list(random, depth)),
        2 => format!("[{one}, {}]", list(random, depth)),
        3 => format!("[{}]", text(random, depth)),
        4 => format!("({one} * 3)"),
        5 => format!("({one})[0:]"),
        6 => format!("({one}) | list"),
        7 => format!("({one}) | map('string') | list"),
        8 => format!("({}).split('x')", text(random, depth)),
        9 => format!("({one}) | reverse | list"),
        10 => format!("[{{'a': {one}, 'b': {}}}]", text(random, depth)),
        _ => format!("({one}) | batch(2) | list"),
    }
}
