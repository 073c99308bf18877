//! Waiting for a device that may be lost meanwhile, or never answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::buffer::Buffer;
use super::device::Device;
use crate::error::{Error, Result};

/// How long a buffer may take to be mapped once the work on it is done.
const MAP_TIMEOUT: Duration = Duration::from_secs(10);

/// What is being done where a buffer cannot be read.
const READING: &str = "reading a buffer";

/// Why a wait has ended without what was waited for.
pub(super) enum Stopped {
    Timeout,
    Other(String),
}

impl Device {
    /// Waits until a submission is done, or all of them.
    ///
    /// # Errors
    /// [`Error::DeviceTimeout`] where none was done for so long that the device must hang; it counts
    /// as lost from then on.
    pub(super) fn wait(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        loop {
            let finished = self.finished.load(Ordering::Relaxed);
            let polled = self.poll(wgpu::PollType::Wait {
                submission_index: submission.clone(),
                timeout: Some(self.time_limit),
            });
            self.check()?;
            match polled {
                Ok(()) => return Ok(()),
                // The limit is one submission's, and there may be more of them.
                Err(Stopped::Timeout) if self.finished.load(Ordering::Relaxed) != finished => {}
                Err(Stopped::Timeout) => return Err(self.give_up()),
                Err(Stopped::Other(message)) => {
                    return Err(self.lost_or("waiting for the device", message));
                }
            }
        }
    }

    /// Polls without a panic: wgpu has one for a device that is lost during a wait, after it has
    /// told the callback. The program's panic hook still hears of it.
    pub(super) fn poll(&self, poll: wgpu::PollType) -> Result<(), Stopped> {
        if self.hangs.load(Ordering::Relaxed) {
            return Err(Stopped::Timeout);
        }
        match catch_unwind(AssertUnwindSafe(|| self.raw.poll(poll))) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(wgpu::PollError::Timeout)) => Err(Stopped::Timeout),
            Ok(Err(error)) => Err(Stopped::Other(error.to_string())),
            Err(_) => Err(Stopped::Other("the driver has given up".to_owned())),
        }
    }

    /// Takes the device as lost, because it hangs.
    fn give_up(&self) -> Error {
        let seconds = self.time_limit.as_secs_f64();
        let message = format!("a submission was not done after {seconds} s");
        self.count_as_lost(message);
        // Whoever lets go of a queue waits for it, without any limit: nobody ever lets go of this one.
        std::mem::forget((self.raw.clone(), self.queue.clone()));
        Error::DeviceTimeout { device: self.info.name.clone(), seconds }
    }

    /// The loss of the device, where that is behind a call that has failed; else the failure itself.
    pub(super) fn lost_or(&self, what: &str, message: String) -> Error {
        if let Err(lost) = self.check() {
            return lost;
        }
        // The news may come with the last submission that is on its way, or be in the hands of another
        // thread, which has not told anybody yet.
        if !self.answers() {
            self.count_as_lost(message.clone());
        }
        match self.check() {
            Err(lost) => lost,
            Ok(()) => self.fault(what, message),
        }
    }

    /// Whether the device still does the least that can be asked of it, once all its work is done.
    fn answers(&self) -> bool {
        let (sender, receiver) = std::sync::mpsc::channel();
        let asked = self.scoped(|| {
            let probe = self.raw.create_buffer(&wgpu::BufferDescriptor {
                label: Some("probe"),
                size: wgpu::MAP_ALIGNMENT,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            probe.map_async(wgpu::MapMode::Read, .., move |result| {
                let _ = sender.send(result.is_ok());
            });
            probe
        });
        let limit = Some(self.time_limit);
        let polled = self.poll(wgpu::PollType::Wait { submission_index: None, timeout: limit });
        asked.is_ok() && polled.is_ok() && receiver.recv_timeout(MAP_TIMEOUT) == Ok(true)
    }

    /// Waits for a submission and reads the first `bytes` of a buffer that it has copied to.
    pub(super) fn map(
        &self,
        buffer: &Buffer,
        bytes: u64,
        submission: Option<wgpu::SubmissionIndex>,
    ) -> Result<Vec<u8>> {
        if bytes == 0 {
            return self.wait(submission).map(|()| Vec::new());
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        buffer.raw().map_async(wgpu::MapMode::Read, ..bytes, move |result| {
            // The receiver is gone where the wait has failed.
            let _ = sender.send(result);
        });
        let read = self.wait(submission).and_then(|()| {
            // Another thread that waits may be the one that brings the news.
            match receiver.recv_timeout(MAP_TIMEOUT) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(self.lost_or(READING, error.to_string())),
                Err(error) => return Err(self.lost_or(READING, error.to_string())),
            }
            let view = buffer.raw().get_mapped_range(..bytes);
            view.map(|view| view.to_vec()).map_err(|error| self.lost_or(READING, error.to_string()))
        });
        // Also where that has failed, or the buffer could not be mapped again. An error here says only
        // that there is nothing to be undone.
        let _ = self.scoped(|| buffer.raw().unmap());
        read
    }
}
