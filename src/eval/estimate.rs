//! Means with their standard errors.

/// A figure and how far it may be off by the choice of samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Its standard error; `None` of a single sample, of which nothing can be said.
    pub error: Option<f64>,
    /// Independent samples that it was made of.
    pub count: usize,
}

impl Estimate {
    /// The mean of independent samples, with the sample deviation over the square root of their
    /// number (as lm-evaluation-harness has it). `None` without a sample.
    pub fn mean(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        Self::ratio(samples.into_iter().map(|sample| (sample, 1.0)))
    }

    /// The ratio of two sums over independent samples, such as nats over tokens, where the samples
    /// are texts: tokens of one text are not independent. The error is that of the linearised
    /// ratio (the delta method). `None` where the second sum is not positive.
    pub fn ratio(samples: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let samples: Vec<(f64, f64)> = samples.into_iter().collect();
        let (over, under) = samples.iter().fold((0.0, 0.0), |sum, s| (sum.0 + s.0, sum.1 + s.1));
        if under.is_nan() || under <= 0.0 {
            return None;
        }
        let (value, count) = (over / under, samples.len());
        let squares: f64 = samples.iter().map(|(a, b)| (a - value * b).powi(2)).sum();
        let n = count as f64;
        let error = (count > 1).then(|| (squares / (n - 1.0) / n).sqrt() / (under / n));
        Some(Self { value, error, count })
    }

    /// The exponential of the figure: perplexity of nats a token.
    pub fn exp(self) -> Self {
        let value = self.value.exp();
        Self { value, error: self.error.map(|error| value * error), ..self }
    }

    /// The figure in another unit.
    pub fn times(self, factor: f64) -> Self {
        let error = self.error.map(|error| error * factor.abs());
        Self { value: self.value * factor, error, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_the_sample_deviation_over_the_root_of_the_count() {
        let found = Estimate::mean([1.0, 0.0, 1.0, 1.0]).expect("samples");
        assert_eq!((found.value, found.count), (0.75, 4));
        // Deviations 1/4, -3/4, 1/4, 1/4: variance 0.75 / 3.
        assert!((found.error.expect("known") - (0.25f64 / 4.0).sqrt()).abs() < 1e-15);
        assert_eq!(Estimate::mean([]), None);
        assert_eq!(Estimate::mean([2.0]).map(|e| e.error), Some(None));
    }

    #[test]
    fn a_ratio_weighs_long_samples_more() {
        let found = Estimate::ratio([(10.0, 10.0), (0.0, 30.0)]).expect("samples");
        assert_eq!(found.value, 0.25);
        // Residuals 7.5 and -7.5 over a mean size of 20.
        assert!((found.error.expect("known") - (112.5f64 / 2.0).sqrt() / 20.0).abs() < 1e-15);
        assert_eq!(Estimate::ratio([(1.0, 0.0)]), None);
    }
}
