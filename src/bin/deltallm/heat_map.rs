//! Heat maps as SVG, for people: a title, axes with units, a colour bar with numbers.

use svg::Document;
use svg::node::element::{Group, Line, Path, Polyline, Rectangle, Text};

use crate::picture::{FAINT, INK, line, page, text};

/// Width of a picture in pixels.
const WIDTH: f64 = 900.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 120.0;
const TOP: f64 = 84.0;
/// Below the plot: tick numbers, the axis' label, and a line for each outline.
const BOTTOM: f64 = 62.0;
const LEGEND_LINE: f64 = 22.0;
/// Colours of a scale; more cannot be told apart, and cells of one colour share one path.
const LEVELS: usize = 24;

/// A matrix of numbers, drawn as coloured cells.
pub struct HeatMap {
    pub title: String,
    /// A smaller line below the title.
    pub subtitle: String,
    pub x: Axis,
    pub y: Axis,
    /// Rows from the top; `None` stays blank.
    pub cells: Vec<Vec<Option<f64>>>,
    pub scale: Scale,
    pub outlines: Vec<Outline>,
    /// Height of the plot in pixels.
    pub height: f64,
}

/// What is along a side of the plot.
pub struct Axis {
    /// With its unit.
    pub label: &'static str,
    pub kind: AxisKind,
}

pub enum AxisKind {
    /// One cell an entry, numbered from 0 below its middle.
    Entries,
    /// Positions from 0 to this, numbered at round ones.
    Positions(usize),
}

/// Which colour stands for which number.
pub struct Scale {
    /// What the numbers are, with their unit.
    pub label: &'static str,
    pub low: f64,
    pub high: f64,
    /// Equal ratios, not equal differences, look alike.
    pub logarithmic: bool,
    /// How a number is written.
    pub write: fn(f64) -> String,
}

/// A line over the plot, in the units of its axes, with its entry in the legend.
pub struct Outline {
    pub label: String,
    pub colour: &'static str,
    pub points: Vec<(f64, f64)>,
}

impl Scale {
    /// From 0 to this, in equal steps.
    pub fn to(high: f64, label: &'static str, write: fn(f64) -> String) -> Self {
        Self { label, low: 0.0, high, logarithmic: false, write }
    }

    /// Where a number stands in the scale, from 0 to 1.
    fn place(&self, x: f64) -> f64 {
        let place = match self.logarithmic {
            true => (x.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (x - self.low) / (self.high - self.low),
        };
        place.clamp(0.0, 1.0)
    }

    /// Places from 0 to 1 and their numbers: powers of ten, or steps of equal size.
    fn ticks(&self, steps: f64) -> Vec<(f64, String)> {
        let numbers: Vec<f64> = if self.logarithmic {
            let (first, last) = (self.low.log10().round() as i32, self.high.log10().floor() as i32);
            (first..=last).map(|exponent| 10f64.powi(exponent)).collect()
        } else {
            let steps = steps.floor();
            let step = |index: usize| self.low + index as f64 / steps * (self.high - self.low);
            (0..=steps as usize).map(step).collect()
        };
        numbers.into_iter().map(|x| (self.place(x), (self.write)(x))).collect()
    }
}

/// From light to dark; lightness falls evenly, so that it survives a grey printer.
const RAMP: [[u8; 3]; 6] = [
    [0xf4, 0xf7, 0xfa],
    [0xc9, 0xdd, 0xec],
    [0x86, 0xbc, 0xd6],
    [0x3f, 0x8e, 0xbf],
    [0x1d, 0x5a, 0x9a],
    [0x0a, 0x25, 0x57],
];

/// The colour at a place from 0 to 1.
fn colour(place: f64) -> String {
    let along = place.clamp(0.0, 1.0) * (RAMP.len() - 1) as f64;
    let below = (along as usize).min(RAMP.len() - 2);
    let part = along - below as f64;
    let mixed = |i: usize| {
        let (a, b) = (f64::from(RAMP[below][i]), f64::from(RAMP[below + 1][i]));
        (a + part * (b - a)).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", mixed(0), mixed(1), mixed(2))
}

impl HeatMap {
    /// The picture.
    pub fn draw(&self) -> Document {
        let (width, height) = (WIDTH - LEFT - RIGHT, self.height);
        let below = BOTTOM + LEGEND_LINE * self.outlines.len() as f64;
        let whole = TOP + height + below;
        let frame = Rectangle::new()
            .set("x", LEFT)
            .set("y", TOP)
            .set("width", width)
            .set("height", height)
            .set("fill", "none")
            .set("stroke", INK);
        let mut document = page(&self.title, WIDTH, whole)
            .add(self.draw_subtitle())
            .add(self.draw_cells(width, height))
            .add(self.draw_numbers(width, height))
            .add(self.draw_outlines(width, height))
            .add(frame);
        document = self.draw_axes(document, width, height);
        self.draw_colour_bar(document, height)
    }

    /// As large as fits.
    fn draw_subtitle(&self) -> Text {
        let letters = self.subtitle.chars().count() as f64;
        let size = ((WIDTH - 40.0) / letters.max(1.0) / 0.58).min(12.0);
        text(&self.subtitle, 20.0, 56.0, "start").set("fill", FAINT).set("font-size", size)
    }

    /// Cells of one colour in one path each, runs of a row as one rectangle.
    fn draw_cells(&self, width: f64, height: f64) -> Group {
        let (rows, columns) = self.size();
        let level = |cell: &Option<f64>| {
            cell.map(|x| (self.scale.place(x) * (LEVELS - 1) as f64).round() as usize)
        };
        let mut paths = vec![String::new(); LEVELS];
        for (y, row) in self.cells.iter().enumerate() {
            let mut x = 0;
            while x < row.len() {
                let now = level(&row[x]);
                let run = row[x..].iter().take_while(|cell| level(cell) == now).count();
                if let Some(level) = now {
                    paths[level] += &format!("M{x} {y}h{run}v1h-{run}z");
                }
                x += run;
            }
        }
        let (sx, sy) = (width / columns as f64, height / rows as f64);
        let mut group = Group::new()
            .set("transform", format!("translate({LEFT} {TOP}) scale({sx:.5} {sy:.5})"))
            .set("shape-rendering", "crispEdges");
        for (level, path) in paths.into_iter().enumerate().filter(|(_, path)| !path.is_empty()) {
            let fill = colour(level as f64 / (LEVELS - 1) as f64);
            group = group.add(Path::new().set("fill", fill).set("d", path));
        }
        group
    }

    /// Numbers in the cells, where all of them have room.
    fn draw_numbers(&self, width: f64, height: f64) -> Group {
        let (rows, columns) = self.size();
        let (sx, sy) = (width / columns as f64, height / rows as f64);
        let mut group = Group::new().set("font-size", 11);
        if sx < 44.0 || sy < 14.0 {
            return group;
        }
        for (y, row) in self.cells.iter().enumerate() {
            for (x, cell) in row.iter().enumerate() {
                let Some(value) = *cell else { continue };
                let ink = if self.scale.place(value) > 0.5 { "white" } else { INK };
                let (x, y) = (LEFT + (x as f64 + 0.5) * sx, TOP + (y as f64 + 0.5) * sy + 4.0);
                group =
                    group.add(text(&(self.scale.write)(value), x, y, "middle").set("fill", ink));
            }
        }
        group
    }

    fn draw_outlines(&self, width: f64, height: f64) -> Group {
        let mut group = Group::new();
        let (across, down) = (self.x.extent(self.size().1), self.y.extent(self.size().0));
        for (index, outline) in self.outlines.iter().enumerate() {
            let points = outline.points.iter().map(|(x, y)| {
                format!("{:.1},{:.1}", LEFT + x / across * width, TOP + y / down * height)
            });
            let line = Polyline::new()
                .set("points", points.collect::<Vec<_>>().join(" "))
                .set("fill", "none")
                .set("stroke", outline.colour)
                .set("stroke-width", 1.6);
            let y = TOP + height + BOTTOM + LEGEND_LINE * index as f64;
            let sample = Line::new()
                .set("x1", LEFT)
                .set("x2", LEFT + 28.0)
                .set("y1", y - 4.0)
                .set("y2", y - 4.0)
                .set("stroke", outline.colour)
                .set("stroke-width", 2.5);
            group = group.add(line).add(sample);
            group = group.add(text(&outline.label, LEFT + 36.0, y, "start"));
        }
        group
    }

    fn draw_axes(&self, mut document: Document, width: f64, height: f64) -> Document {
        let (rows, columns) = self.size();
        for (place, number) in self.x.ticks(columns, width / 56.0) {
            let x = LEFT + place * width;
            document = document.add(line(x, TOP + height, x, TOP + height + 5.0)).add(text(
                &number,
                x,
                TOP + height + 19.0,
                "middle",
            ));
        }
        for (place, number) in self.y.ticks(rows, height / 24.0) {
            let y = TOP + place * height;
            document = document.add(line(LEFT - 5.0, y, LEFT, y)).add(text(
                &number,
                LEFT - 9.0,
                y + 4.0,
                "end",
            ));
        }
        let (x, y) = (26.0, TOP + height / 2.0);
        document.add(text(self.x.label, LEFT + width / 2.0, TOP + height + 40.0, "middle")).add(
            text(self.y.label, x, y, "middle").set("transform", format!("rotate(-90 {x} {y})")),
        )
    }

    fn draw_colour_bar(&self, mut document: Document, height: f64) -> Document {
        let x = WIDTH - RIGHT + 26.0;
        let step = height / LEVELS as f64;
        for level in 0..LEVELS {
            let bar = Rectangle::new()
                .set("x", x)
                .set("y", TOP + height - (level + 1) as f64 * step)
                .set("width", 16)
                .set("height", step + 0.5)
                .set("fill", colour(level as f64 / (LEVELS - 1) as f64));
            document = document.add(bar);
        }
        let frame = Rectangle::new()
            .set("x", x)
            .set("y", TOP)
            .set("width", 16)
            .set("height", height)
            .set("fill", "none")
            .set("stroke", INK);
        document = document.add(frame);
        for (place, number) in self.scale.ticks((height / 40.0).clamp(1.0, 5.0)) {
            let y = TOP + height * (1.0 - place);
            document = document.add(line(x + 16.0, y, x + 20.0, y)).add(text(
                &number,
                x + 24.0,
                y + 4.0,
                "start",
            ));
        }
        let end = WIDTH - 14.0;
        document.add(text(self.scale.label, end, TOP - 10.0, "end"))
    }

    /// Rows and columns, at least one of each.
    fn size(&self) -> (usize, usize) {
        let columns = self.cells.first().map_or(1, Vec::len);
        (self.cells.len().max(1), columns.max(1))
    }
}

impl Axis {
    fn extent(&self, cells: usize) -> f64 {
        match self.kind {
            AxisKind::Entries => cells as f64,
            AxisKind::Positions(end) => end.max(1) as f64,
        }
    }

    /// Places from 0 to 1 and their numbers, at most about so many.
    fn ticks(&self, cells: usize, most: f64) -> Vec<(f64, String)> {
        let extent = self.extent(cells);
        let step = round_step(extent / most.max(1.0));
        let middle = match self.kind {
            AxisKind::Entries => 0.5,
            AxisKind::Positions(_) => 0.0,
        };
        (0..)
            .map(|index| index as f64 * step)
            .take_while(|at| at + middle <= extent)
            .map(|at| ((at + middle) / extent, format!("{at}")))
            .collect()
    }
}

/// The next of 1, 2, 5, 10, 20 and so on.
fn round_step(least: f64) -> f64 {
    let mut ten = 1.0;
    loop {
        for step in [1.0, 2.0, 5.0] {
            if step * ten >= least {
                return step * ten;
            }
        }
        ten *= 10.0;
    }
}
