//! The escape sequences of an interactive console.

/// Ctrl-A.
const ESCAPE: u8 = 1;

pub(crate) const HELP: &str = "\r\nhusk: Ctrl-A x  end the VM at once\r\n\
     husk: Ctrl-A p  press the guest's power button\r\n\
     husk: Ctrl-A a  send Ctrl-A (so does Ctrl-A Ctrl-A)\r\n\
     husk: Ctrl-A h  this help (so does Ctrl-A ?)\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Leave,
    PowerButton,
    Help,
}

/// Takes escape sequences out of what is typed, wherever the reads happen to cut it.
#[derive(Default)]
pub(crate) struct Filter {
    escaped: bool,
}

impl Filter {
    /// Append what goes to the guest to `out` (at most one byte more than `typed`, when a Ctrl-A from an earlier
    /// call turns out to be no sequence), and report what the rest asks for, in order.
    pub(crate) fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>, mut act: impl FnMut(Action)) {
        for &byte in typed {
            if !self.escaped {
                self.escaped = byte == ESCAPE;
                if !self.escaped {
                    out.push(byte);
                }
                continue;
            }
            self.escaped = false;
            match byte {
                b'x' | b'X' => act(Action::Leave),
                b'p' | b'P' => act(Action::PowerButton),
                b'h' | b'H' | b'?' => act(Action::Help),
                b'a' | b'A' | ESCAPE => out.push(ESCAPE),
                other => out.extend([ESCAPE, other]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(reads: &[&[u8]]) -> (Vec<u8>, Vec<Action>) {
        let (mut out, mut actions) = (Vec::new(), Vec::new());
        let mut filter = Filter::default();
        for read in reads {
            filter.filter(read, &mut out, |action| actions.push(action));
        }
        (out, actions)
    }

    #[test]
    fn sequences_are_taken_out_and_acted_on_in_order() {
        let (out, actions) = run(&[b"ab\x01pc\x01?\x01hd\x01x"]);
        assert_eq!(out, b"abcd");
        assert_eq!(
            actions,
            [
                Action::PowerButton,
                Action::Help,
                Action::Help,
                Action::Leave
            ]
        );
    }

    #[test]
    fn a_sequence_may_be_cut_between_two_reads() {
        assert_eq!(
            run(&[b"a\x01", b"xb"]),
            (b"ab".to_vec(), vec![Action::Leave])
        );
    }

    #[test]
    fn ctrl_a_can_be_sent_and_what_is_no_sequence_goes_through() {
        assert_eq!(
            run(&[b"\x01a\x01\x01\x01z\x01", b"\n"]).0,
            b"\x01\x01\x01z\x01\n"
        );
    }
}
