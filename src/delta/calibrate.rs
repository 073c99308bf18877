//! Thresholds for each KV head from what each threshold costs it: curves, and the choice among
//! their points. No model is run here.

use std::ops::AddAssign;

use rayon::prelude::*;

use super::analysis::{CompressedHead, LayerTrace};
use super::policy::AttentionPolicy;
use crate::error::Result;
use crate::formats::CacheFormat;

/// What thresholds do to one KV head, over some text; add those of several texts up.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// By ascending threshold; at least one.
    pub points: Vec<CurvePoint>,
    /// Elements of the compressed keys.
    pub elements: u64,
    /// The sum of the squares of the outputs of dense attention, over the queries that were looked
    /// at and the query heads of the group.
    pub squares: f64,
}

/// One threshold of a [`Curve`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// In the unit of the policy's threshold.
    pub theta: f32,
    /// Elements whose difference is zero.
    pub zeros: u64,
    /// The sum of the squares of what the attention outputs differ by from dense attention.
    pub error: f64,
}

impl AddAssign<&Self> for Curve {
    /// Adds the counts of another text, point by point: both are of the same thresholds.
    fn add_assign(&mut self, other: &Self) {
        self.elements += other.elements;
        self.squares += other.squares;
        for (point, more) in self.points.iter_mut().zip(&other.points) {
            point.zeros += more.zeros;
            point.error += more.error;
        }
    }
}

impl Curve {
    /// Zeros at a threshold, linear between points.
    fn zeros_at(&self, theta: f32) -> f64 {
        let after = self.points.partition_point(|point| point.theta <= theta);
        let (first, last) = (after.saturating_sub(1), after.min(self.points.len() - 1));
        let (a, b) = (self.points[first], self.points[last]);
        let width = f64::from(b.theta) - f64::from(a.theta);
        let share = if width > 0.0 { (f64::from(theta) - f64::from(a.theta)) / width } else { 0.0 };
        a.zeros as f64 + share.clamp(0.0, 1.0) * (b.zeros as f64 - a.zeros as f64)
    }

    /// Indices of the points worth choosing, by ascending zeros: the lower convex hull of error over
    /// zeros, from its least error on. Each further one costs more error a zero than the one before.
    fn hull(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.points.len()).collect();
        let at = |i: usize| self.points[i];
        order.sort_by(|&a, &b| {
            at(a).zeros.cmp(&at(b).zeros).then(at(b).error.total_cmp(&at(a).error))
        });
        let mut hull: Vec<usize> = Vec::new();
        for next in order {
            // As many zeros or more for no more error.
            while hull.last().is_some_and(|&last| at(last).error >= at(next).error) {
                hull.pop();
            }
            if hull.last().is_some_and(|&last| at(last).zeros == at(next).zeros) {
                continue;
            }
            while let [.., a, b] = hull[..]
                && self.slope(a, b) >= self.slope(b, next)
            {
                hull.pop();
            }
            hull.push(next);
        }
        hull
    }

    /// Error that each further zero takes between two points.
    fn slope(&self, from: usize, to: usize) -> f64 {
        let (from, to) = (self.points[from], self.points[to]);
        (to.error - from.error) / (to.zeros as f64 - from.zeros as f64)
    }
}

/// Chooses a point of each curve, so that there are at least `zeros` zeros in all and the sum of the
/// weighted errors is small; gives the index of each point. `None` where that many cannot be had.
///
/// One Lagrange multiplier, the error that a further zero may take, is common to all curves: of each
/// the point is taken at which the next one would cost more. No other choice with as many zeros in
/// all as the one found has a smaller error.
///
/// # Panics
/// Where there is not one weight for each curve.
pub fn allocate(curves: &[Curve], weights: &[f64], zeros: u64) -> Option<Vec<usize>> {
    assert_eq!(curves.len(), weights.len(), "a weight for each curve");
    let hulls: Vec<Vec<usize>> = curves.iter().map(Curve::hull).collect();
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull[0]).collect();
    let count = |(curve, &point): (&Curve, &usize)| curve.points[point].zeros;
    let mut total: u64 = curves.iter().zip(&chosen).map(count).sum();
    let mut steps = Vec::new();
    for (head, hull) in hulls.iter().enumerate() {
        for pair in hull.windows(2) {
            let slope = weights[head] * curves[head].slope(pair[0], pair[1]);
            steps.push((slope, head, pair[0], pair[1]));
        }
    }
    // Stable: steps of equal slope stay in the order of their curve.
    steps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut steps = steps.into_iter();
    while total < zeros {
        let (_, head, from, to) = steps.next()?;
        let points = &curves[head].points;
        total += points[to].zeros - points[from].zeros;
        chosen[head] = to;
    }
    Some(chosen)
}

/// The least and the most zeros that [`allocate`] can choose.
pub fn reachable_zeros(curves: &[Curve]) -> [u64; 2] {
    let ends = |curve: &Curve| {
        let hull = curve.hull();
        [hull[0], hull[hull.len() - 1]].map(|point| curve.points[point].zeros)
    };
    curves.iter().map(ends).fold([0, 0], |sum, ends| [sum[0] + ends[0], sum[1] + ends[1]])
}

/// The one threshold for all heads that gives about as many zeros, linear between the points of the
/// curves.
pub fn uniform_theta(curves: &[Curve], zeros: u64) -> f32 {
    let thetas = curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.theta));
    let (mut low, mut high) = (0.0, thetas.fold(0.0, f32::max));
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        let found: f64 = curves.iter().map(|curve| curve.zeros_at(middle)).sum();
        if found < zeros as f64 { low = middle } else { high = middle }
    }
    high
}

impl LayerTrace {
    /// What each of `thetas`, which ascend, does to a KV head, in the unit of the policy's threshold.
    /// Errors are taken over the `queries` at these positions.
    ///
    /// # Errors
    /// As [`PageLayout::new`](super::PageLayout::new).
    ///
    /// # Panics
    /// Where a query is not within the text.
    pub fn curve(
        &self,
        policy: &AttentionPolicy,
        kv_head: usize,
        thetas: &[f32],
        queries: &[usize],
    ) -> Result<Curve> {
        let group = self.shape.heads / self.shape.kv_heads;
        let head_dim = self.shape.head_dim;
        // The outputs of the group's heads at the queries, `[queries, group, D]`.
        let outputs = |head: &CompressedHead| {
            let mut all = vec![0.0; queries.len() * group * head_dim];
            for (at, out) in queries.iter().zip(all.chunks_exact_mut(group * head_dim)) {
                let row = at * self.shape.width() + kv_head * group * head_dim;
                let rows = self.queries[row..][..group * head_dim].chunks_exact(head_dim);
                for (row, out) in rows.zip(out.chunks_exact_mut(head_dim)) {
                    head.attend(*at, row, out);
                }
            }
            all
        };
        let squares = |x: f32| f64::from(x) * f64::from(x);
        let dense = outputs(&self.compress(&AttentionPolicy::plain(CacheFormat::F32), kv_head)?);
        let point = |&theta: &f32| {
            let head = self.compress(&policy.with_theta(Some(theta)), kv_head)?;
            let found = outputs(&head);
            let error = found.iter().zip(&dense).map(|(a, b)| squares(a - b)).sum();
            let counts = head.statistics();
            Ok((CurvePoint { theta, zeros: counts.zeros, error }, counts.elements))
        };
        let found: Vec<(CurvePoint, u64)> = thetas.par_iter().map(point).collect::<Result<_>>()?;
        Ok(Curve {
            elements: found.first().map_or(0, |(_, elements)| *elements),
            points: found.into_iter().map(|(point, _)| point).collect(),
            squares: dense.iter().map(|&x| squares(x)).sum(),
        })
    }

    /// The standard deviation of the elements of a KV head's keys over the whole text.
    pub fn key_deviation(&self, kv_head: usize) -> f64 {
        let (width, head_dim) = (self.shape.kv_width(), self.shape.head_dim);
        let rows = self.keys.chunks_exact(width).map(|row| &row[kv_head * head_dim..][..head_dim]);
        let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
        for k in rows.flatten().map(|&k| f64::from(k)) {
            (sum, squares, count) = (sum + k, squares + k * k, count + 1.0);
        }
        let mean: f64 = sum / f64::max(count, 1.0);
        (squares / f64::max(count, 1.0) - mean * mean).max(0.0).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::formats::AttentionShape;
    use crate::sampler::Draws;

    fn curve(points: &[(u64, f64)]) -> Curve {
        let point = |(i, &(zeros, error)): (usize, &(u64, f64))| CurvePoint {
            theta: i as f32,
            zeros,
            error,
        };
        Curve {
            points: points.iter().enumerate().map(point).collect(),
            elements: 100,
            squares: 1.0,
        }
    }

    fn sums(curves: &[Curve], weights: &[f64], chosen: &[usize]) -> (u64, f64) {
        let of = |((curve, weight), &i): ((&Curve, &f64), &usize)| {
            (curve.points[i].zeros, weight * curve.points[i].error)
        };
        let all = curves.iter().zip(weights).zip(chosen).map(of);
        all.fold((0, 0.0), |sum, (zeros, error)| (sum.0 + zeros, sum.1 + error))
    }

    #[test]
    fn only_the_hull_is_worth_choosing() {
        // The second costs more than a mixture of its neighbours, the fourth gives nothing.
        let one = curve(&[(0, 0.0), (10, 5.0), (30, 6.0), (29, 7.0), (50, 9.0), (50, 8.5)]);
        assert_eq!(one.hull(), [0, 5]);
        let one = curve(&[(5, 3.0), (10, 1.0), (20, 1.5), (30, 3.0)]);
        assert_eq!(one.hull(), [1, 2, 3]);
        assert_eq!(curve(&[(7, 1.0)]).hull(), [0]);
        assert_eq!(curve(&[(7, 1.0), (7, 0.5), (7, 2.0)]).hull(), [1]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

        /// Against every choice there is.
        #[test]
        fn no_choice_with_as_many_zeros_is_better(
            heads in prop::collection::vec(
                (prop::collection::vec((0u64..40, 0.0f64..10.0), 1..5), 0.1f64..4.0), 1..5),
            share in 0.0f64..1.0,
        ) {
            let curves: Vec<Curve> = heads.iter().map(|(points, _)| curve(points)).collect();
            let weights: Vec<f64> = heads.iter().map(|(_, weight)| *weight).collect();
            let [least, most] = reachable_zeros(&curves);
            let target = (share * most as f64) as u64;
            let chosen = allocate(&curves, &weights, target).expect("can be reached");
            let (zeros, error) = sums(&curves, &weights, &chosen);
            prop_assert!(zeros >= target && zeros >= least);
            prop_assert_eq!(allocate(&curves, &weights, most + 1), None);
            let mut every = vec![Vec::new()];
            for curve in &curves {
                every = (0..curve.points.len())
                    .flat_map(|i| every.iter().map(move |chosen| [&chosen[..], &[i]].concat()))
                    .collect();
            }
            for other in every {
                let (others, expected) = sums(&curves, &weights, &other);
                prop_assert!(others < zeros || expected >= error - 1e-9, "{other:?} {chosen:?}");
            }
        }
    }

    #[test]
    fn one_threshold_for_all_is_between_points() {
        let curves =
            [curve(&[(0, 0.0), (40, 1.0), (80, 2.0)]), curve(&[(0, 0.0), (20, 1.0), (80, 2.0)])];
        assert!((uniform_theta(&curves, 30) - 0.5).abs() < 1e-4);
        assert!((uniform_theta(&curves, 110) - 1.5).abs() < 1e-4);
        assert!((uniform_theta(&curves, 160) - 2.0).abs() < 1e-4);
        assert!(uniform_theta(&curves, 0) < 1e-4);
    }

    /// The points are what the analysis of the whole prompt says.
    #[test]
    fn a_curve_agrees_with_the_analysis() {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 16 };
        let (mut draws, tokens) = (Draws::new(3), 80);
        let mut random = |n: usize| (0..n).map(|_| 2.0 * draws.draw() - 1.0).collect::<Vec<f32>>();
        let trace = LayerTrace {
            shape,
            queries: random(tokens * shape.width()),
            keys: random(tokens * shape.kv_width()),
            values: random(tokens * shape.kv_width()),
        };
        let queries: Vec<usize> = (0..tokens).collect();
        for policy in ["delta page=16", "paper page=16", "delta reference=anchored page=16"] {
            let policy: AttentionPolicy = policy.parse().expect("a policy");
            for kv_head in 0..2 {
                let thetas = [0.0, 0.3, 0.9];
                let mut curve = trace.curve(&policy, kv_head, &thetas, &queries).expect("curve");
                for (point, theta) in curve.points.iter().zip(thetas) {
                    let policy = policy.with_theta(Some(theta));
                    let head = &trace.analyse(&policy).expect("analysed")[kv_head];
                    assert_eq!(point.zeros, head.statistics.zeros);
                    assert_eq!(curve.elements, head.statistics.elements);
                    let largest = head.output_errors.iter().copied().fold(0.0, f64::max);
                    let relative = (point.error / curve.squares).sqrt();
                    assert!(relative <= largest + 1e-9, "{relative} {head:?}");
                    assert!(relative >= largest / 2.0, "{relative} {head:?}");
                }
                let once = curve.clone();
                curve += &once;
                assert_eq!(curve.points[1].zeros, 2 * once.points[1].zeros);
                assert_eq!(curve.elements, 2 * once.elements);
            }
        }
        let expected = (1.0f64 / 3.0).sqrt();
        assert!((trace.key_deviation(1) - expected).abs() < 0.05, "{}", trace.key_deviation(1));
    }
}
