//! What `initcall_debug` has a kernel print: `initcall acpi_init+0x0/0x5d0 returned 0 after 4021 usecs`.
//!
//! Older kernels count in units of 1024 ns and call them usecs, too; the oldest say `msecs` and mean it. A printk time, a caller
//! (`[    T1]`) and a syslog level may go before. The text is a guest's: lines that are not of this shape are passed over.

use crate::{Initcall, stats};

/// What a kernel with everything built in has, several times over.
const MAX: usize = 20_000;
/// Symbols of Linux are at most 511 bytes long; a module's name goes beside.
const MAX_NAME: usize = 600;

/// The initcalls in a console's text, the slowest first; of equal ones, the first that ended.
pub fn parse(console: &str) -> Vec<Initcall> {
    // A console may end its lines with CR LF or LF CR, or have a CR within.
    let lines = console.split(['\n', '\r']);
    let mut calls: Vec<Initcall> = lines.filter_map(line).take(MAX).collect();
    let order = stats::descending(&mut calls.iter().map(|call| call.us));
    let slower = |index: u32| std::mem::take(&mut calls[index as usize]);
    order.into_iter().map(slower).collect()
}

fn line(line: &str) -> Option<Initcall> {
    let (before, rest) = line.split_once("initcall ")?;
    // Nothing but time, caller and level goes before.
    let stamp = |c: char| c.is_ascii_alphanumeric() || "[]<>.,: \t".contains(c);
    if before.len() > 80 || !before.chars().all(stamp) {
        return None;
    }
    // "acpi_init+0x0/0x5d0 [module]"
    let (function, rest) = rest.split_once(" returned ")?;
    let (returned, rest) = rest.split_once(" after ")?;
    let (time, unit) = rest.split_once(' ')?;
    let scale = match unit.trim_end() {
        "usecs" => 1,
        "msecs" => 1000,
        _ => return None,
    };
    let number = |text: &str| -> Option<i64> {
        let digits = text.bytes().all(|c| c.is_ascii_digit());
        digits.then(|| text.parse().ok())?
    };
    let returned = match returned.strip_prefix('-') {
        Some(negative) => -number(negative)?,
        None => number(returned)?,
    };
    Some(Initcall {
        name: name(function)?,
        us: u64::try_from(number(time)?).ok()?.checked_mul(scale)?,
        returned,
    })
}

/// The name of a function that a stranger's symbol table has; None of what is none.
pub fn function(symbol: &str) -> Option<String> {
    name(symbol).filter(|_| !symbol.contains(' '))
}

/// Function and module without the offset, which differs between builds.
fn name(function: &str) -> Option<String> {
    let (symbol, module) = match function.split_once(' ') {
        Some((symbol, module)) => (symbol, Some(module.strip_prefix('[')?.strip_suffix(']')?)),
        None => (function, None),
    };
    let symbol = symbol
        .split_once("+0x")
        .map_or(symbol, |(symbol, _)| symbol);
    let fits = |text: &str| {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_.$-:<>".contains(&c);
        !text.is_empty() && text.bytes().all(allowed)
    };
    if function.len() > MAX_NAME || !fits(symbol) || !module.is_none_or(fits) {
        return None;
    }
    Some(match module {
        Some(module) => format!("{symbol} [{module}]"),
        None => symbol.into(),
    })
}

#[cfg(test)]
mod tests;
