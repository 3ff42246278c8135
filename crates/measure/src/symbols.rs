//! Names for addresses: a kernel without KALLSYMS tells of its initcalls by address, and its vmlinux has the names.

use husk_bench::Initcall;
use object::read::ReadCache;
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSymbol};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

/// Replace those names of `calls` that are addresses with what the symbol table of `kernel` has for them. Without one (a bzImage,
/// a stripped vmlinux, one that was moved when it was loaded) they stay as they are.
pub fn name(calls: &mut [Initcall], kernel: &Path) {
    let address = |name: &str| u64::from_str_radix(name.strip_prefix("0x")?, 16).ok();
    let wanted = calls.iter().filter_map(|call| address(&call.name));
    let mut names: BTreeMap<u64, Option<String>> = wanted.map(|at| (at, None)).collect();
    if names.is_empty() {
        return;
    }
    let Ok(file) = File::open(kernel) else { return };
    let cache = ReadCache::new(file);
    let Ok(elf) = ElfFile64::<LittleEndian, _>::parse(&cache) else {
        return;
    };
    for symbol in elf.symbols() {
        if let Some(name) = names.get_mut(&symbol.address())
            && symbol.kind() == object::SymbolKind::Text
            && let Ok(text) = symbol.name()
        {
            *name = husk_bench::initcalls::function(text);
        }
    }
    for call in calls {
        let known = address(&call.name).and_then(|at| names.get(&at)?.clone());
        if let Some(name) = known {
            call.name = name;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn a_function_to_be_found() {
        std::hint::black_box(0);
    }

    /// This test's own executable has a symbol table, too.
    #[test]
    fn an_address_becomes_the_name_in_the_symbol_table() {
        let own = std::env::current_exe().unwrap();
        let cache = ReadCache::new(File::open(&own).unwrap());
        let elf = ElfFile64::<LittleEndian, _>::parse(&cache).unwrap();
        let is_probe = |symbol: &object::read::elf::ElfSymbol64<'_, '_, LittleEndian, _>| {
            let name = symbol.name().unwrap_or_default();
            symbol.kind() == object::SymbolKind::Text && name.contains("a_function_to_be_found")
        };
        let probe = elf.symbols().find(is_probe).unwrap().address();
        a_function_to_be_found();
        let call = |name: String| Initcall {
            name,
            ..Initcall::default()
        };
        let mut calls = [
            call(format!("{probe:#x}")),
            call("0x1".into()),
            call("acpi_init".into()),
        ];
        name(&mut calls, &own);
        let [found, unknown, named] = calls.map(|call| call.name);
        assert!(found.contains("a_function_to_be_found"), "{found}");
        assert_eq!([unknown, named], ["0x1", "acpi_init"]);
    }

    #[test]
    fn what_is_no_kernel_names_nothing() {
        let mut calls = [Initcall {
            name: "0xffffffff81000000".into(),
            ..Initcall::default()
        }];
        for file in ["/dev/null", "/no/such/file", "/etc/hostname", "/"] {
            name(&mut calls, Path::new(file));
            assert_eq!(calls[0].name, "0xffffffff81000000");
        }
    }
}
