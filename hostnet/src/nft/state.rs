//! What the kernel holds of a table, read back to notice that someone flushed or changed it.

use super::{
    Family, Table,
    encode::{self, Fnv, comment_of, family_number},
    prefixes,
};
use crate::{
    Error, Handle, Result,
    socket::{ACK, DUMP, REQUEST, consistent},
    wire::{self, Builder, attribute, attributes},
};

const HEADER_LEN: usize = 4;
/// Attribute of a table: nft's user data, here its comment.
pub(super) const TABLE_USER_DATA: u16 = 6;

/// A table as the kernel has it, condensed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableState {
    /// The comment that [`Handle::replace_table`] left, if nobody replaced the table since.
    pub comment: Option<String>,
    /// Number of chains.
    pub chains: usize,
    /// Number of rules in all chains.
    pub rules: usize,
    /// Number of sets.
    pub sets: usize,
    /// Number of interval bounds in all sets.
    pub elements: usize,
    /// A hash over chains, rules and set elements, without counters and handles. It changes if anything is changed in
    /// place; remember the one read after a replacement and compare.
    pub digest: u64,
}

impl TableState {
    /// Whether this is what [`Handle::replace_table`] makes of `table`: fingerprint and counts agree.
    pub fn matches(&self, table: &Table) -> bool {
        let bounds = |set: &super::Set| {
            let intervals = prefixes::intervals(&set.prefixes);
            intervals.iter().map(|interval| 1 + usize::from(interval.after.is_some())).sum::<usize>()
        };
        self.comment.as_deref() == Some(&comment_of(table.fingerprint()))
            && self.chains == table.chains.len()
            && self.rules == table.rule_count()
            && self.sets == table.sets.len()
            && self.elements == table.sets.iter().map(bounds).sum::<usize>()
    }
}

/// Reads the state of a table.
pub(super) fn read(handle: &mut Handle, family: Family, name: &str) -> Result<Option<TableState>> {
    let object = Table::new(family, name).to_string();
    let question = Question { object: &object, family: family_number(family), table: name };
    match consistent(&object, || {
        // Someone's change between two of the dumps shows in the number.
        let before = generation(handle)?;
        let state = question.state(handle)?;
        Ok((before == generation(handle)?).then_some(state))
    }) {
        Ok(state) => Ok(Some(state)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The number of the ruleset.
pub(super) fn generation(handle: &mut Handle) -> Result<u32> {
    let object = "nftables generation";
    let channel = handle.netfilter()?;
    let sequence = channel.next_sequence();
    let message = Builder::new(encode::kind(libc::NFT_MSG_GETGEN), REQUEST | ACK, sequence).raw(&encode::header(0, 0));
    channel.send(&message.finish(), object)?;
    let mut number = None;
    channel.collect(object, sequence, |message| {
        number = message.payload.get(HEADER_LEN..).and_then(|body| wire::be32(attribute(body, 1)?));
        Ok(())
    })?;
    number.ok_or_else(|| Error::Malformed { object: object.into(), reason: "the number is missing".into() })
}

struct Question<'a> {
    object: &'a str,
    family: u8,
    table: &'a str,
}

impl Question<'_> {
    fn state(&self, handle: &mut Handle) -> Result<TableState> {
        let mut state = TableState::default();
        let mut hash = Fnv::default();
        self.ask(handle, libc::NFT_MSG_GETTABLE, ACK, &[], |body| {
            state.comment = attribute(body, TABLE_USER_DATA).and_then(comment);
        })?;
        self.ask(handle, libc::NFT_MSG_GETCHAIN, DUMP, &[], |body| {
            // Dumps of chains and of sets name the table but not all kernels filter by it.
            if self.is_ours(body) {
                state.chains += 1;
                for kind in [3, 4, 5, 7] {
                    hash.add(attribute(body, kind).unwrap_or_default());
                }
            }
        })?;
        self.ask(handle, libc::NFT_MSG_GETRULE, DUMP, &[], |body| {
            if self.is_ours(body) {
                state.rules += 1;
                hash.add(attribute(body, 2).unwrap_or_default());
                add_expressions(&mut hash, attribute(body, 4).unwrap_or_default());
            }
        })?;
        let mut sets = Vec::new();
        self.ask(handle, libc::NFT_MSG_GETSET, DUMP, &[], |body| {
            if self.is_ours(body) {
                sets.extend(attribute(body, 2).map(wire::text));
            }
        })?;
        sets.sort();
        state.sets = sets.len();
        for set in &sets {
            hash.add(set.as_bytes());
            self.ask(handle, libc::NFT_MSG_GETSETELEM, DUMP, set.as_bytes(), |body| {
                let list = attribute(body, 3).unwrap_or_default();
                state.elements += attributes(list).count();
                hash.add(list);
            })?;
        }
        state.digest = hash.0;
        Ok(state)
    }

    fn is_ours(&self, body: &[u8]) -> bool {
        attribute(body, 1).map(wire::text).as_deref() == Some(self.table)
    }

    fn ask(
        &self,
        handle: &mut Handle,
        message: libc::c_int,
        flags: u16,
        set: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<()> {
        let channel = handle.netfilter()?;
        let sequence = channel.next_sequence();
        let mut request = Builder::new(encode::kind(message), REQUEST | flags, sequence)
            .raw(&encode::header(self.family, 0))
            .text(1, self.table);
        if !set.is_empty() {
            request = request.text(2, &String::from_utf8_lossy(set));
        }
        channel.send(&request.finish(), self.object)?;
        channel.collect(self.object, sequence, |message| {
            if i32::from(message.kind) != libc::NLMSG_DONE {
                each(message.payload.get(HEADER_LEN..).unwrap_or_default());
            }
            Ok(())
        })
    }
}

/// Adds a rule's expressions to the hash; of counters only that they are there.
fn add_expressions(hash: &mut Fnv, list: &[u8]) {
    for (_, expression) in attributes(list) {
        let name = attribute(expression, 1).map(wire::text).unwrap_or_default();
        hash.add(name.as_bytes());
        if name != "counter" {
            hash.add(attribute(expression, 2).unwrap_or_default());
        }
    }
}

/// The comment in nft's user data.
fn comment(data: &[u8]) -> Option<String> {
    let mut rest = data;
    while let [kind, length, tail @ ..] = rest {
        let value = tail.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(wire::text(value));
        }
        rest = &tail[usize::from(*length)..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn odd_user_data_and_expressions_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = comment(&bytes);
            add_expressions(&mut Fnv::default(), &bytes);
        }
    }
}
