//! What the pictures share: a page with a title, lines and texts in one ink.

use svg::Document;
use svg::node::element::{Line, Rectangle, Text, Title};

pub const INK: &str = "#222222";
pub const FAINT: &str = "#666666";
/// Colours that can be told apart by the colour-blind, too (Okabe and Ito).
pub const COLOURS: [&str; 7] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// A white page of this size in pixels, with its title.
pub fn page(title: &str, width: f64, height: f64) -> Document {
    Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("width", width)
        .set("height", height)
        .set("font-family", "system-ui, 'DejaVu Sans', Arial, sans-serif")
        .set("font-size", 13)
        .add(Title::new(title))
        .add(Rectangle::new().set("width", width).set("height", height).set("fill", "white"))
        .add(text(title, 20.0, 32.0, "start").set("font-size", 19))
}

pub fn text(content: &str, x: f64, y: f64, anchor: &str) -> Text {
    Text::new(content).set("x", x).set("y", y).set("text-anchor", anchor).set("fill", INK)
}

pub fn line(x1: f64, y1: f64, x2: f64, y2: f64) -> Line {
    Line::new().set("x1", x1).set("y1", y1).set("x2", x2).set("y2", y2).set("stroke", INK)
}
