//! Points with error bars as SVG, for people: series in colours, a level that they are compared with.

use svg::Document;
use svg::node::element::{Circle, Group, Rectangle, Title};

use crate::picture::{COLOURS, FAINT, line, page, text};

const WIDTH: f64 = 760.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 56.0;
const HEIGHT: f64 = 320.0;
const BOTTOM: f64 = 62.0;
const LEGEND_LINE: f64 = 20.0;

/// A figure of something that has a place on the horizontal axis.
pub struct Point {
    pub x: f64,
    pub y: f64,
    /// Its standard error.
    pub error: f64,
    /// Points of one series share a colour and are joined by a line.
    pub series: String,
    /// Shown where the pointer is held over it.
    pub name: String,
}

/// Points, and a level that they are compared with.
pub struct Scatter {
    pub title: String,
    /// What is along the axes.
    pub x: &'static str,
    pub y: String,
    /// At least one.
    pub points: Vec<Point>,
    /// Name, value and standard error.
    pub level: (String, f64, f64),
}

/// Round numbers along an axis.
struct Scale {
    low: f64,
    high: f64,
    step: f64,
}

impl Scale {
    /// Holds all of these, with about five numbers.
    fn around(values: impl Iterator<Item = f64> + Clone) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let spread = if high > low { high - low } else { high.abs().max(1e-6) * 0.1 };
        let rough = spread * 1.1 / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough);
        let step = step.unwrap_or(10.0 * power);
        let (low, high) = (low - 0.05 * spread, high + 0.05 * spread);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    fn place(&self, x: f64) -> f64 {
        (x - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = (f64, String)> {
        let digits = (-self.step.log10().floor()).clamp(0.0, 8.0) as usize;
        let count = ((self.high - self.low) / self.step).round() as usize;
        (0..=count).map(move |i| {
            let x = self.low + i as f64 * self.step;
            (x, format!("{x:.digits$}"))
        })
    }
}

impl Scatter {
    /// The picture.
    pub fn draw(&self) -> Document {
        let (_, level, level_error) = self.level;
        let ends = self.points.iter().flat_map(|p| [p.y - p.error, p.y + p.error]);
        let y = Scale::around(ends.chain([level - level_error, level + level_error]));
        let x = Scale::around(self.points.iter().map(|point| point.x));
        let mut series: Vec<&str> = Vec::new();
        for point in &self.points {
            if !series.contains(&point.series.as_str()) {
                series.push(&point.series);
            }
        }
        let (width, legend) = (WIDTH - LEFT - RIGHT, LEGEND_LINE * (series.len() + 1) as f64);
        let whole = TOP + HEIGHT + BOTTOM + legend;
        let at_x = |value: f64| LEFT + x.place(value) * width;
        let at_y = |value: f64| TOP + (1.0 - y.place(value)) * HEIGHT;
        let mut document = page(&self.title, WIDTH, whole);
        for (value, number) in x.ticks() {
            let at = at_x(value);
            document = document
                .add(line(at, TOP, at, TOP + HEIGHT).set("stroke", "#eeeeee"))
                .add(text(&number, at, TOP + HEIGHT + 18.0, "middle"));
        }
        for (value, number) in y.ticks() {
            let at = at_y(value);
            document = document
                .add(line(LEFT, at, LEFT + width, at).set("stroke", "#eeeeee"))
                .add(text(&number, LEFT - 8.0, at + 4.0, "end"));
        }
        let (up, down) = (at_y(level + level_error), at_y(level - level_error));
        document = document
            .add(
                Rectangle::new()
                    .set("x", LEFT)
                    .set("y", up)
                    .set("width", width)
                    .set("height", (down - up).max(0.0))
                    .set("fill", "#dddddd")
                    .set("fill-opacity", 0.6),
            )
            .add(
                line(LEFT, at_y(level), LEFT + width, at_y(level))
                    .set("stroke", FAINT)
                    .set("stroke-width", 1.5),
            )
            .add(line(LEFT, TOP, LEFT, TOP + HEIGHT))
            .add(line(LEFT, TOP + HEIGHT, LEFT + width, TOP + HEIGHT))
            .add(text(self.x, LEFT + width / 2.0, TOP + HEIGHT + 40.0, "middle"));
        let (side, middle) = (26.0, TOP + HEIGHT / 2.0);
        let label = text(&self.y, side, middle, "middle");
        document = document.add(label.set("transform", format!("rotate(-90 {side} {middle})")));
        for (index, name) in series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let mut points: Vec<&Point> =
                self.points.iter().filter(|p| p.series == *name).collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            let mut group = Group::new();
            for pair in points.windows(2) {
                let (x1, y1) = (at_x(pair[0].x), at_y(pair[0].y));
                let (x2, y2) = (at_x(pair[1].x), at_y(pair[1].y));
                group = group
                    .add(line(x1, y1, x2, y2).set("stroke", colour).set("stroke-opacity", 0.5));
            }
            for point in points {
                let (x, y) = (at_x(point.x), at_y(point.y));
                let (up, down) = (at_y(point.y + point.error), at_y(point.y - point.error));
                let dot = dot(x, y, index);
                group = group
                    .add(line(x, up, x, down).set("stroke", colour).set("stroke-width", 1.5))
                    .add(dot.add(Title::new(format!("{}: {:.4}", point.name, point.y))));
            }
            let y = TOP + HEIGHT + BOTTOM + LEGEND_LINE * index as f64;
            document = document.add(group).add(dot(LEFT + 8.0, y - 4.0, index)).add(text(
                name,
                LEFT + 24.0,
                y,
                "start",
            ));
        }
        let y = TOP + HEIGHT + BOTTOM + LEGEND_LINE * series.len() as f64;
        let level = format!("{}, ± one standard error, as the bars", self.level.0);
        document
            .add(
                line(LEFT, y - 4.0, LEFT + 16.0, y - 4.0)
                    .set("stroke", FAINT)
                    .set("stroke-width", 1.5),
            )
            .add(text(&level, LEFT + 24.0, y, "start"))
    }
}

/// The dot of a series: full, and hollow where the colours begin anew.
fn dot(x: f64, y: f64, series: usize) -> Circle {
    let colour = COLOURS[series % COLOURS.len()];
    let hollow = series / COLOURS.len() % 2 == 1;
    Circle::new()
        .set("cx", x)
        .set("cy", y)
        .set("r", 4)
        .set("fill", if hollow { "white" } else { colour })
        .set("stroke", colour)
        .set("stroke-width", 2)
}
