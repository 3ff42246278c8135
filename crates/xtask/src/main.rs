//! `cargo xtask`: what a person developing Husk runs.
//!
//! Each command does its own set-up and says what it is doing: Debian packages come by apt-get
//! (downloaded and unpacked into the cache where that is enough, installed where it is not), and
//! everything else by cargo.
#![forbid(unsafe_code)]

mod apt;
mod bench;
mod bench_api;
mod bench_boot;
mod bench_devices;
mod bench_diffs;
mod bench_forks;
mod bench_linux;
mod bench_snapshots;
mod boot_time;
mod cargo;
mod clients;
mod demo;
mod fuzz;
mod guest;
mod host;
mod kernel;
mod test;
mod testbed;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "What a person developing Husk runs")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build Husk, fetch Debian's cloud kernel and boot it: a shell on a terminal, else a short script
    Demo(demo::Args),
    /// Run every test of the project: unit, native smoke, end to end
    Test(test::Args),
    /// Run the fuzz targets, each for a bounded time
    Fuzz(fuzz::Args),
    /// Run a command on an emulated host that has a real /dev/kvm (AMD SVM)
    Testbed(testbed::Args),
    /// Build the minimal guest kernel of resources/guest-kernel into the cache (about 6 minutes on two cores)
    Kernel,
    /// Measure start-up time, memory and size beside the floor and QEMU microvm
    Bench(bench::Args),
    /// Run `husk bench boot` on the testbed, where the clock counts instructions
    BenchBoot(bench_boot::Args),
    /// Measure how long guests take to boot, and compare with what is committed
    BootTime(boot_time::Args),
    /// Time boots to init; what `bench` runs on the testbed
    #[command(hide = true)]
    BenchInner(bench::InnerArgs),
    /// Time boots under requests; what `bench` runs on the testbed
    #[command(hide = true)]
    BenchApiInner(bench_api::InnerArgs),
    /// Time devices; what `bench` runs on the testbed
    #[command(hide = true)]
    BenchDevicesInner(bench_devices::InnerArgs),
    /// Time snapshots of Linux; what `bench` runs on the testbed
    #[command(hide = true)]
    BenchLinuxInner(bench_linux::InnerArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Testbed(args) => testbed::run(&args),
        Command::Kernel => kernel::run(),
        Command::Bench(args) => bench::run(&args),
        Command::BenchBoot(args) => bench_boot::run(&args),
        Command::BootTime(args) => boot_time::run(&args),
        Command::BenchInner(args) => bench::run_inner(&args),
        Command::BenchApiInner(args) => bench_api::run_inner(&args),
        Command::BenchDevicesInner(args) => bench_devices::run_inner(&args),
        Command::BenchLinuxInner(args) => bench_linux::run_inner(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
