//! Figures of several repeats.

/// What repeated measurements of one thing gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    /// Every one of them, in the order they were made.
    pub samples: Vec<f64>,
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The median of their distances from the median.
    pub deviation: f64,
}

impl Spread {
    /// `None` without a sample.
    pub fn new(samples: Vec<f64>) -> Option<Self> {
        let middle = median(&samples)?;
        let distances: Vec<f64> = samples.iter().map(|x| (x - middle).abs()).collect();
        Some(Self {
            median: middle,
            min: samples.iter().copied().fold(f64::INFINITY, f64::min),
            max: samples.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            deviation: median(&distances)?,
            samples,
        })
    }
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { (sorted[middle - 1] + upper) / 2.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let found = Spread::new(vec![5.0, 1.0, 4.0, 100.0, 3.0]).expect("samples");
        assert_eq!((found.median, found.min, found.max), (4.0, 1.0, 100.0));
        // Distances 1, 3, 0, 96, 1.
        assert_eq!(found.deviation, 1.0);
        assert_eq!(found.samples[3], 100.0);
        let found = Spread::new(vec![2.0, 1.0]).expect("samples");
        assert_eq!((found.median, found.deviation), (1.5, 0.5));
        let found = Spread::new(vec![7.0]).expect("samples");
        assert_eq!((found.median, found.min, found.max, found.deviation), (7.0, 7.0, 7.0, 0.0));
        assert_eq!(Spread::new(Vec::new()), None);
    }
}
