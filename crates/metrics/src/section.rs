//! A named group of values.

use crate::value::{Counter, Gauge, Latency, Micros};

/// One value of a [`Section`].
#[derive(Clone, Copy, Debug)]
pub enum Metric<'a> {
    /// Told in JSON as the difference to the time before.
    Counter(&'a Counter),
    /// Told as it is.
    Gauge(&'a Gauge),
    /// Told as it is, in microseconds.
    Micros(&'a Micros),
    /// The sum is told as the difference to the time before, minimum and maximum as they are.
    Latency(&'a Latency),
}

/// Values that are told together.
pub trait Section: Send + Sync {
    /// Call `each` with every value's name and help text, in the order of declaration.
    fn visit<'a>(&'a self, each: &mut dyn FnMut(&'static str, &'static str, Metric<'a>));
}

/// Types that are values.
pub(crate) trait Value {
    fn metric(&self) -> Metric<'_>;
}

impl Value for Counter {
    fn metric(&self) -> Metric<'_> {
        Metric::Counter(self)
    }
}

impl Value for Gauge {
    fn metric(&self) -> Metric<'_> {
        Metric::Gauge(self)
    }
}

impl Value for Micros {
    fn metric(&self) -> Metric<'_> {
        Metric::Micros(self)
    }
}

impl Value for Latency {
    fn metric(&self) -> Metric<'_> {
        Metric::Latency(self)
    }
}

/// Declare sections: each field's documentation is its help text in Prometheus, too.
macro_rules! sections {
    ($($(#[doc = $about:literal])+ $name:ident { $($(#[doc = $help:literal])+ $field:ident: $kind:ident,)+ })+) => {$(
        $(#[doc = $about])+
        // Lines of the cache of its own: who counts in the next section is on another thread.
        #[derive(Debug, Default)]
        #[repr(align(64))]
        pub struct $name {
            $($(#[doc = $help])+ pub $field: $kind,)+
        }

        impl $name {
            /// With nothing counted.
            pub const fn new() -> Self {
                Self { $($field: $kind::new(),)+ }
            }
        }

        impl $crate::section::Section for $name {
            fn visit<'a>(&'a self, each: &mut dyn FnMut(&'static str, &'static str, $crate::section::Metric<'a>)) {
                $(each(stringify!($field), concat!($($help),+), $crate::section::Value::metric(&self.$field));)+
            }
        }
    )+};
}

/// Declare [`crate::Metrics`]: what the process counts, in the order in which it is told.
macro_rules! process {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ty = $new:expr,)+) => {
        /// All that the process counts, in the order of a line.
        #[derive(Debug)]
        pub struct Metrics {
            $($(#[doc = $help])+ pub $field: $kind,)+
        }

        impl Metrics {
            /// With nothing counted and no devices.
            pub const fn new() -> Self {
                Self { $($field: $new,)+ }
            }

            pub(crate) fn groups(&'static self) -> Vec<$crate::snapshot::Group> {
                vec![$($crate::snapshot::Grouped::group(&self.$field, stringify!($field)),)+]
            }

            /// Call `what` with each section and its name, in the order of a line. Allocates nothing.
            pub(crate) fn each(&'static self, what: &mut dyn FnMut(&'static str, &dyn $crate::last::Last)) {
                $(what(stringify!($field), &self.$field);)+
            }

            /// A device that was taken away has been told of for the last time.
            pub(crate) fn forget_gone(&'static self) {
                $($crate::snapshot::Grouped::forget_gone(&self.$field);)+
            }
        }
    };
}

pub(crate) use {process, sections};
