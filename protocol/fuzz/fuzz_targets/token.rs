//! A line that is a token prints as a line that is the same token.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_protocol::token::JoinToken;

fuzz_target!(|line: &str| {
    if let Ok(token) = line.parse::<JoinToken>() {
        assert_eq!(token.to_line().parse::<JoinToken>().map(|again| again.id()), Ok(token.id()));
    }
});
