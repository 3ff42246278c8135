//! Parts of inputs that the mutations of a fuzzer do well with: a change at one place changes little else.

use arbitrary::{Arbitrary, Result, Unstructured};

/// Up to 255 bytes, behind their number.
#[derive(Clone, Debug, Default)]
pub struct Bytes(pub Vec<u8>);

impl<'a> Arbitrary<'a> for Bytes {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let length = usize::from(u8::arbitrary(input)?).min(input.len());
        Ok(Self(input.bytes(length)?.to_vec()))
    }
}

/// A few of something, at most `MOST`, behind their number. They end where the input does.
#[derive(Clone, Debug)]
pub struct Few<T, const MOST: usize>(pub Vec<T>);

impl<'a, T: Arbitrary<'a>, const MOST: usize> Arbitrary<'a> for Few<T, MOST> {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let count = usize::from(u8::arbitrary(input)?) % (MOST + 1);
        let mut all = Vec::new();
        while all.len() < count && !input.is_empty() {
            all.push(T::arbitrary(input)?);
        }
        Ok(Self(all))
    }
}

/// Something that is there in one case of sixteen.
#[derive(Clone, Copy, Debug)]
pub struct Rare<T>(pub Option<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Rare<T> {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let there = u8::arbitrary(input)? >= 0xf0;
        there.then(|| T::arbitrary(input)).transpose().map(Self)
    }
}

/// A length or the like: small as a rule, sometimes any number.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Number {
    /// Below 256.
    Small(u8),
    /// Below 65536.
    Medium(u16),
    /// Any.
    Any(u32),
}

impl Number {
    /// The number.
    pub fn get(self) -> u32 {
        match self {
            Number::Small(number) => number.into(),
            Number::Medium(number) => number.into(),
            Number::Any(number) => number,
        }
    }
}
