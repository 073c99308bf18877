//! What is measured.

use std::fmt;

use crate::error::{Error, Result};

/// One thing that is measured, named as the field names it: `pp512`, `tg128 @ d4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Test {
    /// What is done.
    pub kind: TestKind,
    /// Tokens of the prompt, or tokens that are made.
    pub tokens: usize,
    /// Tokens that are in the cache before.
    pub depth: usize,
}

/// What a [`Test`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TestKind {
    /// Runs a prompt and chooses the token after it.
    Prompt,
    /// Makes one token after another, each chosen from the logits of the one before.
    Generate,
}

impl TestKind {
    /// The kind in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Generate => "generate",
        }
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            TestKind::Prompt => "pp",
            TestKind::Generate => "tg",
        };
        write!(f, "{kind}{}", self.tokens)?;
        match self.depth {
            0 => Ok(()),
            depth => write!(f, " @ d{depth}"),
        }
    }
}

/// What is measured, and how often.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchOptions {
    /// Tokens of the prompts.
    pub prompts: Vec<usize>,
    /// Tokens to make.
    pub generates: Vec<usize>,
    /// Tokens in the cache before, each with every prompt and every number of tokens.
    pub depths: Vec<usize>,
    /// Measurements of each test.
    pub repeats: usize,
    /// Runs of each test before they are measured: kernels are compiled, memory is touched.
    pub warm_up: usize,
    /// Runs each test once more with the time of every kernel.
    pub profile: bool,
}

impl Default for BenchOptions {
    /// What llama-bench users are used to, and deeper.
    fn default() -> Self {
        Self {
            prompts: vec![128, 512, 2048],
            generates: vec![32, 128],
            depths: vec![0, 4096, 16384],
            repeats: 5,
            warm_up: 1,
            profile: false,
        }
    }
}

impl BenchOptions {
    /// The tests in the order they run: by depth, so that a cache is filled once, prompts first.
    /// None twice.
    pub fn tests(&self) -> Vec<Test> {
        let sorted = |list: &[usize]| {
            let mut list = list.to_vec();
            list.sort_unstable();
            list.dedup();
            list
        };
        let mut tests = Vec::new();
        for depth in sorted(&self.depths) {
            for (kind, list) in
                [(TestKind::Prompt, &self.prompts), (TestKind::Generate, &self.generates)]
            {
                let test = |tokens| Test { kind, tokens, depth };
                tests.extend(sorted(list).into_iter().map(test));
            }
        }
        tests
    }

    /// Tokens that the context needs.
    pub fn context(&self) -> usize {
        self.tests().iter().map(Test::end).max().unwrap_or(0)
    }

    /// Tokens of the prompt whose first answer is timed: the shortest prompt, else 128, as far as the
    /// context allows.
    pub fn first_prompt(&self, context: usize) -> usize {
        self.prompts.iter().copied().min().unwrap_or(128).min(context)
    }

    /// Refuses what cannot be measured with a model of this context.
    ///
    /// # Errors
    /// [`Error::Parameter`], [`Error::ContextFull`].
    pub fn check(&self, context: usize) -> Result<()> {
        let refuse = |name, value: &str, allowed: &str| {
            Err(Error::Parameter { name, value: value.into(), allowed: allowed.into() })
        };
        if self.repeats == 0 {
            return refuse("repeats", "0", "must be at least 1");
        }
        for (name, list) in [("prompt", &self.prompts), ("generate", &self.generates)] {
            if list.contains(&0) {
                return refuse(name, "0", "must be at least 1 token");
            }
        }
        let tests = self.tests();
        if tests.is_empty() {
            return refuse("tests", "none", "at least one prompt or number of tokens, and a depth");
        }
        match tests.iter().find(|test| test.end() > context) {
            None => Ok(()),
            Some(test) => Err(Error::Parameter {
                name: "test",
                value: test.to_string(),
                allowed: format!(
                    "needs a context of {} tokens, but the model's limit is {context}",
                    test.end()
                ),
            }),
        }
    }
}

impl Test {
    /// Tokens in the cache at its end.
    pub fn end(&self) -> usize {
        self.depth.saturating_add(self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_run_by_depth_and_none_twice() {
        let options = BenchOptions {
            prompts: vec![512, 128, 512],
            generates: vec![32],
            depths: vec![4096, 0],
            ..BenchOptions::default()
        };
        let names: Vec<String> = options.tests().iter().map(Test::to_string).collect();
        let expected = ["pp128", "pp512", "tg32", "pp128 @ d4096", "pp512 @ d4096", "tg32 @ d4096"];
        assert_eq!(names, expected);
        assert_eq!(options.context(), 4608);
        assert!(options.check(4608).is_ok());
        let error = options.check(4607).expect_err("too deep").to_string();
        assert!(error.contains("pp512 @ d4096") && error.contains("4607"), "{error}");
        assert_eq!(options.first_prompt(4608), 128);
        assert_eq!(BenchOptions { prompts: vec![], ..options }.first_prompt(50), 50);
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let good = BenchOptions { depths: vec![0], ..BenchOptions::default() };
        assert!(good.check(4096).is_ok());
        let huge = vec![usize::MAX];
        for bad in [
            BenchOptions { repeats: 0, ..good.clone() },
            BenchOptions { prompts: vec![0], ..good.clone() },
            BenchOptions { generates: vec![32, 0], ..good.clone() },
            BenchOptions { depths: vec![], ..good.clone() },
            BenchOptions { depths: huge, ..good.clone() },
            BenchOptions { prompts: vec![], generates: vec![], ..good.clone() },
        ] {
            assert!(bad.check(4096).is_err(), "{bad:?}");
        }
    }
}
