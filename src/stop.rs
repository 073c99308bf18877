//! Stop texts, found across the pieces of a stream.

/// Lets text through until a stop text comes up, and holds back what may be the beginning of one.
#[derive(Debug)]
pub(crate) struct StopScanner {
    stops: Vec<String>,
    held: String,
}

impl StopScanner {
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// The text that is certain not to belong to a stop text, and the stop text that was found: of
    /// those that are whole by now the one that begins first, the longest of those that begin
    /// together.
    pub fn push(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| Some((self.held.find(stop)?, stop)))
            .min_by_key(|(at, stop)| (*at, std::cmp::Reverse(stop.len())));
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.held.len() - self.longest_beginning();
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What is held back at the end of the stream: no stop text came of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that a stop text begins with.
    fn longest_beginning(&self) -> usize {
        let starts = self.held.char_indices().map(|(at, _)| at);
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        starts.clone().find(begins).map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut scanner = StopScanner::new(&stops);
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stop) = scanner.push(piece);
            out.push(text);
            if stop.is_some() {
                return (out, stop);
            }
        }
        out.push(scanner.finish());
        (out, None)
    }

    #[test]
    fn text_passes_where_nothing_stops_it() {
        assert_eq!(run(&[], &["ab", "c"]).0.concat(), "abc");
        assert_eq!(
            run(&["xyz"], &["ax", "yb", "xy"]),
            (["a", "xyb", "", "xy"].map(String::from).to_vec(), None)
        );
    }

    #[test]
    fn a_stop_text_is_found_across_pieces() {
        let (out, stop) = run(&["STOP"], &["go S", "TO", "P no"]);
        assert_eq!((out.concat().as_str(), stop.as_deref()), ("go ", Some("STOP")));
    }

    #[test]
    fn the_first_and_longest_stop_text_wins() {
        let (out, stop) = run(&["b", "bc", "c"], &["abcd"]);
        assert_eq!((out.concat().as_str(), stop.as_deref()), ("a", Some("bc")));
    }

    #[test]
    fn characters_of_several_bytes_are_never_cut() {
        let (out, stop) = run(&["é!"], &["é", "é", "?é", "!"]);
        assert_eq!((out.concat().as_str(), stop.as_deref()), ("éé?", Some("é!")));
    }
}
