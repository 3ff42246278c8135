//! What the guest's processors look like: named templates, and `cpu-config` in Firecracker's JSON.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A named processor that guests may move between hosts with. The host must be of its vendor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum CpuTemplate {
    /// The host's own processor, as far as KVM can give it.
    #[default]
    None,
    /// Intel: an EC2 C3 instance (Ivy Bridge).
    C3,
    /// Intel: an EC2 T2 instance (Haswell).
    T2,
    /// Intel: as `T2`, and safe to move between Skylake and Cascade Lake.
    T2S,
    /// Intel Cascade Lake or newer, with the instructions that `T2A` has.
    T2CL,
    /// AMD Milan, with the instructions that `T2CL` has.
    T2A,
}

impl CpuTemplate {
    pub(crate) fn is_none(&self) -> bool {
        *self == CpuTemplate::None
    }
}

/// Changes of what KVM offers to the guest's processors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities of KVM that the guest's processors rely on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<String>"))]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of model-specific registers, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub msr_modifiers: Vec<MsrModifier>,
    /// Nothing, on x86-64.
    #[serde(default, skip_serializing)]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<serde_json::Value>"))]
    pub reg_modifiers: OnlyOnAarch64,
    /// Nothing, on x86-64.
    #[serde(default, skip_serializing)]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<serde_json::Value>"))]
    pub vcpu_features: OnlyOnAarch64,
}

/// A number of a `KVM_CAP_…`; in JSON a decimal string, with `!` in front for [`KvmCapability::NotNeeded`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// A host whose KVM does not have it is refused.
    Needed(u32),
    /// It is not looked for, whatever Husk's own needs are. Husk looks for none by number, so this changes nothing.
    NotNeeded(u32),
}

/// Changes of one leaf and subleaf. KVM must have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf, what the guest has in EAX.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_prefixed")]
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub leaf: u32,
    /// The subleaf, what the guest has in ECX.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_prefixed")]
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub subleaf: u32,
    /// `KVM_CPUID_FLAG_…` of the entry.
    pub flags: u32,
    /// The registers that change.
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of one register of a CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which one.
    pub register: CpuidRegister,
    /// The change.
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub bitmap: Bitmap<32>,
}

/// A register that CPUID fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX
    Eax,
    /// EBX
    Ebx,
    /// ECX
    Ecx,
    /// EDX
    Edx,
}

/// A change of one model-specific register. KVM must have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its index, what RDMSR takes in ECX.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_prefixed")]
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub addr: u32,
    /// The change.
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub bitmap: Bitmap<64>,
}

/// Bits of a register of `BITS` bits that are given a value; the others stay. In JSON the digits from the highest bit down,
/// `x` for one that stays: `0b1xx0`. `_` may stand between digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bitmap<const BITS: u32> {
    mask: u64,
    value: u64,
}

impl<const BITS: u32> Bitmap<BITS> {
    /// The bits of `mask` become those of `value`. Bits beyond the register's are left out.
    pub const fn new(mask: u64, value: u64) -> Self {
        let mask = mask & (u64::MAX >> (64 - BITS));
        let value = value & mask;
        Self { mask, value }
    }

    /// `register` after the change.
    pub const fn apply(&self, register: u64) -> u64 {
        register & !self.mask | self.value
    }

    fn parse(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let (mut mask, mut value, mut count) = (0, 0, 0);
        for digit in digits.chars().filter(|&digit| digit != '_') {
            let (fixed, bit) = match digit {
                'x' => (0, 0),
                '0' => (1, 0),
                '1' => (1, 1),
                other => return Err(format!("{text:?} is no bitmap: {other:?} is not 0, 1 or x")),
            };
            count += 1;
            if count > BITS {
                return Err(format!("{text:?} has more than the register's {BITS} bits"));
            }
            mask = mask << 1 | fixed;
            value = value << 1 | bit;
        }
        match count {
            0 => Err(format!("{text:?} is no bitmap: write for example 0b1xx0")),
            _ => Ok(Self { mask, value }),
        }
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |bit: u32| match (self.mask >> bit & 1, self.value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        let digits: String = (0..BITS).rev().map(digit).collect();
        serializer.serialize_str(&format!("0b{digits}"))
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            KvmCapability::Needed(number) => serializer.collect_str(number),
            KvmCapability::NotNeeded(number) => serializer.serialize_str(&format!("!{number}")),
        }
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (digits, needed) = match text.strip_prefix('!') {
            Some(digits) => (digits, false),
            None => (text.as_str(), true),
        };
        let number = digits.parse().map_err(|_| {
            D::Error::custom(format!(
                "{text:?} is no KVM capability: write its number, \"171\", or \"!171\""
            ))
        })?;
        Ok(match needed {
            true => KvmCapability::Needed(number),
            false => KvmCapability::NotNeeded(number),
        })
    }
}

/// A list that must be empty, because what it holds only aarch64 has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnlyOnAarch64;

impl<'de> Deserialize<'de> for OnlyOnAarch64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Vec::<serde_json::Value>::deserialize(deserializer)? {
            list if list.is_empty() => Ok(OnlyOnAarch64),
            _ => Err(D::Error::custom(
                "reg_modifiers and vcpu_features are for aarch64: leave them out or empty",
            )),
        }
    }
}

fn to_hex<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{number:#x}"))
}

/// A number, with its base in front if it is not decimal: `0x10a`, `0b101`, `266`.
fn from_prefixed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let text = String::deserialize(deserializer)?;
    let number = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => digits_of(digits, 16),
        (_, Some(digits)) => digits_of(digits, 2),
        _ => digits_of(&text, 10),
    };
    number.ok_or_else(|| {
        D::Error::custom(format!(
            "{text:?} is no 32-bit number with 0x or 0b in front: write for example 0x10a"
        ))
    })
}

/// Without a sign, which `from_str_radix` would take.
fn digits_of(digits: &str, radix: u32) -> Option<u32> {
    let plain = digits.chars().all(|digit| digit.is_digit(radix));
    plain.then(|| u32::from_str_radix(digits, radix).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"{
        "kvm_capabilities": ["171", "!56"],
        "cpuid_modifiers": [{
            "leaf": "0x80000001", "subleaf": "0b0111", "flags": 1,
            "modifiers": [{"register": "ecx", "bitmap": "0b1xx0"}, {"register": "eax", "bitmap": "0b0000_1111_xxxx"}]
        }],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1x"}],
        "reg_modifiers": [], "vcpu_features": []
    }"#;

    #[test]
    fn firecrackers_json_is_read_and_written_back_the_same() {
        let config: CpuConfig = serde_json::from_str(EXAMPLE).unwrap();
        assert_eq!(
            config.kvm_capabilities,
            [KvmCapability::Needed(171), KvmCapability::NotNeeded(56)]
        );
        let leaf = &config.cpuid_modifiers[0];
        assert_eq!((leaf.leaf, leaf.subleaf, leaf.flags), (0x8000_0001, 7, 1));
        assert_eq!(leaf.modifiers[0].register, CpuidRegister::Ecx);
        assert_eq!(leaf.modifiers[0].bitmap, Bitmap::new(0b1001, 0b1000));
        assert_eq!(leaf.modifiers[1].bitmap, Bitmap::new(0xff0, 0x0f0));
        assert_eq!(config.msr_modifiers[0].addr, 0x10a);
        let text = serde_json::to_string(&config).unwrap();
        assert!(
            text.contains(&format!("\"0b{}1xx0\"", "x".repeat(28))),
            "{text}"
        );
        assert!(
            text.contains(&format!("\"0b{}1x\"", "x".repeat(62))),
            "{text}"
        );
        assert!(
            text.contains(r#""leaf":"0x80000001","subleaf":"0x7""#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<CpuConfig>(&text).unwrap(), config);
        assert_eq!(
            serde_json::from_str::<CpuConfig>("{}").unwrap(),
            CpuConfig::default()
        );
    }

    #[test]
    fn a_bitmap_changes_the_bits_that_it_names() {
        let bitmap = Bitmap::<32>::parse("0b1xx0").unwrap();
        assert_eq!(bitmap.apply(0b0111), 0b1110);
        assert_eq!(bitmap.apply(0xffff_fff0), 0xffff_fff8);
        let all = Bitmap::<64>::parse(&"1".repeat(64)).unwrap();
        assert_eq!(all.apply(0), u64::MAX);
        assert_eq!(Bitmap::<32>::new(u64::MAX, u64::MAX).apply(0), 0xffff_ffff);
    }

    #[test]
    fn what_cannot_be_is_refused_and_named() {
        for (change, from, to) in [
            ("0b1xz0", "0b1xx0", "0b1xz0"),
            ("32 bits", "0b1xx0", &format!("0b{}", "1".repeat(33))),
            ("no bitmap", "0b1xx0", "0b__"),
            ("0jj0", "0x10a", "0jj0"),
            ("2x6", "0x10a", "2x6"),
            ("0x+10a", "0x10a", "0x+10a"),
            ("0x1_0000_0000", "0x10a", "0x1_0000_0000"),
            ("exx", "ecx", "exx"),
            ("KVM capability", "!56", "!-56"),
            (
                "aarch64",
                r#""reg_modifiers": []"#,
                r#""reg_modifiers": [{"addr": "0x1"}]"#,
            ),
            (
                "aarch64",
                r#""vcpu_features": []"#,
                r#""vcpu_features": [{"index": 0}]"#,
            ),
            ("msr_modifier", "msr_modifiers", "msr_modifier"),
            ("bits", r#""flags""#, r#""bits""#),
        ] {
            let text = EXAMPLE.replace(from, to);
            assert_ne!(text, EXAMPLE);
            let error = serde_json::from_str::<CpuConfig>(&text).unwrap_err();
            assert!(error.to_string().contains(change), "{change}: {error}");
        }
    }
}
