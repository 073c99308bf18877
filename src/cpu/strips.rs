//! Cutting the output of a matrix product into strips, one a task.

/// A few output columns of all tokens: the disjoint parts of the output that one task writes.
pub(super) struct Strip<'a> {
    /// Which piece of the output the strip is of; the first of them where there are several.
    pub(super) piece: usize,
    /// Its first column within the piece.
    pub(super) first: usize,
    /// For each token, its columns of each piece of the group.
    pub(super) columns: Vec<&'a mut [f32]>,
}

/// Cuts `out` `[tokens, sum of pieces]` into strips of up to `height` columns of `group`
/// neighbouring pieces at once.
///
/// The pieces of a group are of equal width but for the last ones, which may be shorter. Rust's
/// slices of rows say that tasks do not overlap; the cost is a pointer for each token and strip.
pub(super) fn cut<'a>(
    out: &'a mut [f32],
    tokens: usize,
    pieces: &[usize],
    group: usize,
    height: impl Fn(usize) -> usize,
) -> Vec<Strip<'a>> {
    let width: usize = pieces.iter().sum();
    assert_eq!(out.len(), tokens * width, "output width");
    // What is left of each piece of each token.
    let mut left: Vec<&mut [f32]> = Vec::with_capacity(tokens * pieces.len());
    for mut row in out.chunks_exact_mut(width.max(1)) {
        for &piece in pieces {
            left.push(row.split_off_mut(..piece).unwrap_or_default());
        }
    }
    let mut strips = Vec::new();
    for piece in (0..pieces.len()).step_by(group) {
        let height = height(piece).max(1);
        for first in (0..pieces[piece]).step_by(height) {
            let mut columns = Vec::with_capacity(tokens * group);
            for token in left.chunks_exact_mut(pieces.len()) {
                for left in &mut token[piece..piece + group] {
                    let count = height.min(left.len());
                    columns.extend(left.split_off_mut(..count));
                }
            }
            strips.push(Strip { piece, first, columns });
        }
    }
    strips
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_cover_the_output_once() {
        // Two matrices of seven and three rows in quarters.
        let pieces = [2, 2, 2, 1, 1, 1, 1, 0];
        let mut out = vec![0.0; 3 * 10];
        let strips = cut(&mut out, 3, &pieces, 4, |_| 1);
        assert_eq!(strips.len(), 3);
        for (i, strip) in strips.into_iter().enumerate() {
            assert_eq!(strip.columns.len(), 3 * 4);
            assert_eq!((strip.piece, strip.first), [(0, 0), (0, 1), (4, 0)][i]);
            for (j, columns) in strip.columns.into_iter().enumerate() {
                columns.fill((100 * i + j) as f32 + 1.0);
            }
        }
        assert!(out.iter().all(|&v| v > 0.0), "{out:?}");
        assert_eq!(out[..10], [1.0, 101.0, 2.0, 102.0, 3.0, 103.0, 4.0, 201.0, 202.0, 203.0]);
    }
}
