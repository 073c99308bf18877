//! Rates as bars: a panel for prompts and one for generation, in each a group of bars for each test.

use deltallm::bench::{Spread, Test, TestKind};
use svg::Document;
use svg::node::element::{Rectangle, Title};

use super::report::{Report, Subject, rate};
use crate::picture::{COLOURS, FAINT, line, page, text};

const WIDTH: f64 = 760.0;
const LEFT: f64 = 120.0;
/// Room for the figures beside the longest bar.
const RIGHT: f64 = 150.0;
const TOP: f64 = 56.0;
const BAR: f64 = 16.0;
const GROUP_GAP: f64 = 12.0;
const PANEL_HEAD: f64 = 34.0;
const LEGEND_LINE: f64 = 20.0;

/// The picture.
pub fn draw(report: &Report) -> Document {
    let subjects: Vec<&Subject> =
        report.subjects.iter().filter(|subject| !subject.lines.is_empty()).collect();
    let tests = report.options.tests();
    let panels = [
        (TestKind::Prompt, "prompt processing, tokens a second"),
        (TestKind::Generate, "generation, tokens a second"),
    ];
    let group = BAR * subjects.len() as f64 + GROUP_GAP;
    let height = |kind| {
        let count = tests.iter().filter(|test| test.kind == kind).count() as f64;
        if count > 0.0 { PANEL_HEAD + count * group + GROUP_GAP } else { 0.0 }
    };
    let panels_end = TOP + panels.iter().map(|(kind, _)| height(*kind)).sum::<f64>();
    let whole = panels_end + LEGEND_LINE * (subjects.len() + 2) as f64;
    let mut document = page(&report.title(), WIDTH, whole);
    let mut top = TOP;
    for (kind, name) in panels {
        let of_kind: Vec<&Test> = tests.iter().filter(|test| test.kind == kind).collect();
        if of_kind.is_empty() {
            continue;
        }
        document = document.add(text(name, LEFT, top + 22.0, "start").set("font-weight", "bold"));
        let fastest = subjects.iter().flat_map(|subject| &subject.lines);
        let fastest = fastest.filter(|line| line.test.kind == kind).map(|line| line.rate.max);
        let fastest = fastest.fold(f64::MIN_POSITIVE, f64::max);
        let scale = (WIDTH - LEFT - RIGHT) / fastest;
        for (index, test) in of_kind.into_iter().enumerate() {
            let y = top + PANEL_HEAD + index as f64 * group;
            let middle = y + BAR * subjects.len() as f64 / 2.0 + 4.0;
            document = document.add(text(&test.to_string(), LEFT - 8.0, middle, "end"));
            for (place, subject) in subjects.iter().enumerate() {
                if let Some(found) = subject.lines.iter().find(|line| line.test == *test) {
                    let y = y + BAR * place as f64;
                    document = bar(document, y, scale, place, &found.rate, &subject.name());
                }
            }
        }
        let end = top + height(kind) - GROUP_GAP;
        document = document.add(line(LEFT, top + PANEL_HEAD - 4.0, LEFT, end - GROUP_GAP + 4.0));
        top += height(kind);
    }
    for (place, subject) in subjects.iter().enumerate() {
        let y = panels_end + LEGEND_LINE * (place + 1) as f64;
        let square = Rectangle::new()
            .set("x", LEFT)
            .set("y", y - 11.0)
            .set("width", 12)
            .set("height", 12)
            .set("fill", COLOURS[place % COLOURS.len()]);
        document = document.add(square).add(text(&subject.name(), LEFT + 20.0, y, "start"));
    }
    let y = panels_end + LEGEND_LINE * (subjects.len() + 1) as f64;
    let repeats = report.options.repeats;
    let note =
        format!("Bars are medians of {repeats}; the lines reach from the slowest to the fastest.");
    document.add(text(&note, LEFT, y, "start").set("fill", FAINT))
}

/// A bar with its spread and its figure.
fn bar(
    document: Document,
    y: f64,
    scale: f64,
    place: usize,
    spread: &Spread,
    subject: &str,
) -> Document {
    let (middle, end) = (y + BAR / 2.0, LEFT + scale * spread.median);
    let (low, high) = (LEFT + scale * spread.min, LEFT + scale * spread.max);
    let title = format!("{subject}: {} tokens/s", rate(spread.median));
    let rectangle = Rectangle::new()
        .set("x", LEFT)
        .set("y", y + 1.0)
        .set("width", end - LEFT)
        .set("height", BAR - 2.0)
        .set("fill", COLOURS[place % COLOURS.len()])
        .add(Title::new(title));
    let figure = text(&rate(spread.median), high.max(end) + 8.0, middle + 4.0, "start");
    document
        .add(rectangle)
        .add(line(low, middle, high, middle).set("stroke-width", 1.5))
        .add(figure.set("font-size", 12))
}
