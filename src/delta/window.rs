//! Which keys a query sees exactly.

/// What a step of tokens is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// A prompt, at the end of which the text has `length` tokens.
    Prefill {
        /// The paper's `L`.
        length: usize,
    },
    /// Tokens that the model makes, one after another.
    Decode,
}

/// The window of the queries of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Window {
    /// All keys: dense attention.
    Everything,
    /// From `floor(i / block) * block` on: the paper's prefill.
    Block(usize),
    /// The last keys, this many.
    Sliding(usize),
    /// The last keys, at least this many, from the start of a page on.
    Pages(usize),
}

/// Which keys a query sees exactly: a prefix of the text, the sink, and its window, which ends with
/// the query's own key. What lies between is approximate.
///
/// A window always holds the query's own page: a page is compressed when it is full, and a query
/// must not depend on keys after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExactRule {
    /// Keys of the sink.
    pub sink: usize,
    /// Tokens of a page.
    pub page: usize,
    /// The window.
    pub window: Window,
}

impl ExactRule {
    /// The first key of the window of the query at position `query`; it never falls as `query`
    /// grows.
    pub fn start(&self, query: usize) -> usize {
        let own_page = query / self.page * self.page;
        let window = match self.window {
            Window::Everything => 0,
            Window::Block(block) => query / block * block,
            Window::Sliding(window) => (query + 1).saturating_sub(window),
            Window::Pages(window) => (query + 1).saturating_sub(window) / self.page * self.page,
        };
        window.min(own_page)
    }

    /// Whether `query` sees `key`, one at or before it, exactly.
    pub fn is_exact(&self, query: usize, key: usize) -> bool {
        key < self.sink || key >= self.start(query)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_by_hand() {
        let rule = |window| ExactRule { sink: 2, page: 16, window };
        assert_eq!(rule(Window::Everything).start(100), 0);
        // Block 40..80; the own page is 64..80.
        assert_eq!(rule(Window::Block(40)).start(79), 40);
        // A block inside the page gives way to the page.
        assert_eq!(rule(Window::Block(5)).start(78), 64);
        assert_eq!(rule(Window::Sliding(20)).start(100), 81);
        assert_eq!(rule(Window::Sliding(1)).start(100), 96);
        assert_eq!(rule(Window::Sliding(500)).start(100), 0);
        // 101 - 20 = 81, in the page that starts at 80.
        assert_eq!(rule(Window::Pages(20)).start(100), 80);
        assert_eq!(rule(Window::Pages(1)).start(100), 96);
        assert!(rule(Window::Pages(1)).is_exact(100, 1));
        assert!(!rule(Window::Pages(1)).is_exact(100, 2));
        assert!(!rule(Window::Pages(1)).is_exact(100, 95));
    }
}
