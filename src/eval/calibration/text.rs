//! A text in segments: some to fit thresholds to, the others to judge them by.

use crate::error::{Error, Result};

/// Token ids of a text in segments, each run as a prompt of its own.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CalibrationText {
    /// Thresholds are fitted to these.
    pub fitting: Vec<Vec<u32>>,
    /// What they do is told from these; where there are none, from those above.
    pub held_out: Vec<Vec<u32>>,
}

impl CalibrationText {
    /// Cuts a text into segments of `length` tokens, what is left over is not used; of more than
    /// `most` segments takes as many, evenly spread. Every second one is held out. Each begins
    /// with the tokens `beginning`, which count.
    ///
    /// # Errors
    /// [`Error::Parameter`] where the text has no segment.
    pub fn new(beginning: &[u32], ids: &[u32], length: usize, most: usize) -> Result<Self> {
        let body = length.saturating_sub(beginning.len());
        if body == 0 || most == 0 || ids.len() < body {
            return Err(Error::Parameter {
                name: "length",
                value: length.to_string(),
                allowed: format!(
                    "a segment needs tokens of its own, and the text has {} beside the {} of its \
                     beginning",
                    ids.len(),
                    beginning.len()
                ),
            });
        }
        let count = ids.len() / body;
        let taken = count.min(most);
        let mut text = Self::default();
        for i in 0..taken {
            let at = i * count / taken * body;
            let segment = [beginning, &ids[at..at + body]].concat();
            if i % 2 == 0 { text.fitting.push(segment) } else { text.held_out.push(segment) }
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_spread_and_every_second_is_held_out() {
        let ids: Vec<u32> = (0..103).collect();
        let text = CalibrationText::new(&[999], &ids, 11, 4).expect("segments");
        let starts = |segments: &[Vec<u32>]| segments.iter().map(|s| s[1]).collect::<Vec<_>>();
        assert_eq!(starts(&text.fitting), [0, 50]);
        assert_eq!(starts(&text.held_out), [20, 70]);
        let all = || text.fitting.iter().chain(&text.held_out);
        assert!(all().all(|segment| segment.len() == 11 && segment[0] == 999));
        let text = CalibrationText::new(&[], &ids, 103, 4).expect("segments");
        assert_eq!((text.fitting.len(), text.held_out.len()), (1, 0));
        for (beginning, length) in [(&[][..], 104), (&[], 0), (&[1, 2], 2), (&[1], 200)] {
            let error = CalibrationText::new(beginning, &ids, length, 4).expect_err("refused");
            assert!(error.to_string().contains("103"), "{error}");
        }
    }
}
