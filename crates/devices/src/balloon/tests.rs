use super::*;
use husk_virtio::testing::{Driver, Layout, Mmio, Subject, check_device, memory};
use husk_virtio::{DeviceThread, GuestMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const ALL: Config = Config {
    amount_mib: 8,
    deflate_on_oom: true,
    stats_polling_interval_s: 1,
    free_page_hinting: true,
    free_page_reporting: true,
};

fn balloon(config: &Config) -> Box<dyn VirtioDevice> {
    Box::new(Balloon::new(config).unwrap())
}

fn driver(config: &Config) -> Driver {
    let thread = Arc::new(DeviceThread::start("balloon", || ()).unwrap());
    let mem = memory();
    let registers = Box::new(Mmio::new(balloon(config), &thread, &mem));
    Driver::new(registers, mem)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

/// Pages of the guest's memory that the host holds, from `first` on.
fn resident(mem: &GuestMemory, first: u64, count: usize) -> usize {
    let slice = mem
        .get_slice(GuestAddress(first * PAGE), count * PAGE as usize)
        .unwrap();
    let mut map = vec![0u8; count];
    let guard = slice.ptr_guard_mut();
    #[allow(unsafe_code)]
    // SAFETY: the range is mapped memory, and the vector has a byte for each of its pages.
    let result = unsafe { libc::mincore(guard.as_ptr().cast(), slice.len(), map.as_mut_ptr()) };
    assert_eq!(result, 0);
    map.iter().filter(|&&page| page & 1 == 1).count()
}

/// Far behind what the driver uses for itself.
const FREE: u64 = 4096;

fn use_it(driver: &mut Driver) {
    let mem = driver.mem.clone();
    let fill = || {
        mem.write_slice(&[7; 64 << 12], GuestAddress(FREE * PAGE))
            .unwrap()
    };
    fill();
    assert_eq!(resident(&mem, FREE, 64), 64);
    // Up, down, and one alone.
    let mut pages: Vec<u32> = (0..16).map(|n| FREE as u32 + n).collect();
    pages.extend((16..32).rev().map(|n| FREE as u32 + n));
    pages.push(FREE as u32 + 40);
    driver.request(0, &[&numbers(&pages)], &[]);
    assert_eq!(resident(&mem, FREE, 64), 31);
    let mut page = [1; 4096];
    mem.read_slice(&mut page, GuestAddress(FREE * PAGE))
        .unwrap();
    assert_eq!(page, [0; 4096]);
    driver.request(1, &[&numbers(&pages)], &[]);
}

#[test]
fn it_is_a_sound_device() {
    check_device(&Subject {
        memory: husk_virtio::testing::memory,
        make: &|| balloon(&ALL),
        use_it: &use_it,
        use_again: None,
        eager: &[0, 1],
    });
    check_device(&Subject {
        memory: husk_virtio::testing::memory,
        make: &|| balloon(&Config::default()),
        use_it: &use_it,
        use_again: None,
        eager: &[0, 1, 2],
    });
}

#[test]
fn page_numbers_outside_memory_are_ignored() {
    let mut driver = driver(&ALL);
    driver.start(u64::MAX, 64);
    driver.request(0, &[&numbers(&[u32::MAX, 1 << 20, 8191, 8192, 8193])], &[]);
    driver.request(0, &[&[1, 2, 3]], &[]);
    use_it(&mut driver);
}

#[test]
fn the_guest_learns_how_much_to_give_and_the_host_how_much_it_gave() {
    let mut driver = driver(&ALL);
    driver.start(u64::MAX, 64);
    let mut config = [0; 8];
    driver.registers.read_config(0, &mut config);
    assert_eq!(config[..4], (8u32 * 256).to_le_bytes());
    driver.registers.write_config(4, &512u32.to_le_bytes());
    // What is the host's to say, the guest cannot.
    driver.registers.write_config(0, &[9; 4]);
    driver.registers.read_config(0, &mut config);
    assert_eq!(config, [0, 8, 0, 0, 0, 2, 0, 0]);
}

#[test]
fn reported_and_hinted_pages_go_back_to_the_host() {
    let mut balloon = Balloon::new(&ALL).unwrap();
    let command = HINT_FIRST;
    balloon.hint(true);
    let thread = Arc::new(DeviceThread::start("balloon", || ()).unwrap());
    let mem = memory();
    let registers = Box::new(Mmio::new(Box::new(balloon), &thread, &mem));
    let mut driver = Driver::new(registers, mem.clone());
    driver.start(u64::MAX, 64);
    let fill = || {
        mem.write_slice(&[7; 64 << 12], GuestAddress(FREE * PAGE))
            .unwrap()
    };
    let free = husk_virtio::testing::Buffers {
        readable: Vec::new(),
        writable: vec![(FREE * PAGE, 32 << 12), ((FREE + 40) * PAGE + 100, 8192)],
    };
    let give = |driver: &mut Driver, queue: usize| {
        driver.queues[queue].add(&free, Layout::Direct, 0);
        driver.registers.notify(queue as u16);
        driver.wait_used(queue);
    };
    fill();
    give(&mut driver, 4);
    // Of the second buffer only the whole page.
    assert_eq!(resident(&mem, FREE, 64), 31);

    let mut id = [0; 4];
    driver.registers.read_config(8, &mut id);
    assert_eq!(u32::from_le_bytes(id), command);
    fill();
    // Not before the guest has said which command it answers, nor for another.
    give(&mut driver, 3);
    driver.request(3, &[&(command + 1).to_le_bytes()], &[]);
    give(&mut driver, 3);
    assert_eq!(resident(&mem, FREE, 64), 64);
    driver.request(3, &[&command.to_le_bytes()], &[]);
    give(&mut driver, 3);
    assert_eq!(resident(&mem, FREE, 64), 31);
}

#[test]
fn statistics_are_asked_for_again_and_again() {
    let mut driver = driver(&ALL);
    driver.start(u64::MAX, 64);
    let record = [&4u16.to_le_bytes()[..], &77u64.to_le_bytes()].concat();
    let chain = driver.chain(&[&record], &[]);
    for _ in 0..2 {
        driver.queues[2].add(&chain, Layout::Direct, 0);
        driver.registers.notify(2);
        // The buffer comes back when the timer wants new ones.
        driver.wait_used(2);
    }
}

#[test]
fn queues_are_numbered_without_those_that_were_not_negotiated() {
    assert_eq!(
        Balloon::purposes(REPORTING),
        [Purpose::Inflate, Purpose::Deflate, Purpose::Reporting]
    );
    let mut driver = driver(&ALL);
    driver.start(!(STATS | HINTING), 64);
    driver
        .mem
        .write_slice(&[7; 4096], GuestAddress(FREE * PAGE))
        .unwrap();
    let free = husk_virtio::testing::Buffers {
        readable: Vec::new(),
        writable: vec![(FREE * PAGE, 4096)],
    };
    driver.queues[2].add(&free, Layout::Direct, 0);
    driver.registers.notify(2);
    driver.wait_used(2);
    assert_eq!(resident(&driver.mem, FREE, 1), 0);
}

#[test]
fn what_the_guest_gives_is_counted() {
    let mut balloon = Balloon::new(&ALL).unwrap();
    let m = Arc::new(BalloonMetrics::default());
    balloon.metrics = Arc::clone(&m);
    let thread = Arc::new(DeviceThread::start("balloon", || ()).unwrap());
    let mem = memory();
    let registers = Box::new(Mmio::new(Box::new(balloon), &thread, &mem));
    let mut driver = Driver::new(registers, mem);
    driver.start(u64::MAX, 64);
    use_it(&mut driver);
    let free = husk_virtio::testing::Buffers {
        readable: Vec::new(),
        writable: vec![(FREE * PAGE, 8192), (FREE * PAGE + 100, 100)],
    };
    driver.queues[4].add(&free, Layout::Direct, 0);
    driver.registers.notify(4);
    driver.wait_used(4);
    assert_eq!((m.inflate_count.total(), m.deflate_count.total()), (1, 1));
    assert_eq!(m.free_page_report_count.total(), 2);
    assert_eq!(m.free_page_report_freed.total(), 8192);
    assert_eq!(m.free_page_report_fails.total(), 1);
    assert_eq!(m.event_fails.total(), 0);
}

#[test]
fn memory_that_others_map_goes_back_to_the_host_as_well() {
    use std::os::unix::fs::MetadataExt;
    let mem = crate::test_support::shared_memory();
    let region = mem.iter().next().unwrap();
    let blocks = || {
        let file = region.file_offset().unwrap().file();
        file.metadata().unwrap().blocks()
    };
    mem.write_slice(&[7; 64 << 12], GuestAddress(FREE * PAGE))
        .unwrap();
    assert_eq!(blocks(), 64 * PAGE / 512);
    assert_eq!(discard::discard(&mem, FREE * PAGE, 60 * PAGE), 60 * PAGE);
    assert_eq!(blocks(), 4 * PAGE / 512);
    let byte: u8 = mem.read_obj(GuestAddress(FREE * PAGE)).unwrap();
    assert_eq!(byte, 0);
}

#[test]
fn starts_and_changes_that_fail_are_counted() {
    let mut balloon = Balloon::new(&ALL).unwrap();
    let m = Arc::new(BalloonMetrics::default());
    balloon.metrics = Arc::clone(&m);
    let thread = Arc::new(DeviceThread::start("balloon", || ()).unwrap());
    let mem = memory();
    let registers = Box::new(Mmio::new(Box::new(balloon), &thread, &mem));
    let mut driver = Driver::new(registers, mem);
    driver.start_badly();
    assert_eq!((m.activate_fails.total(), m.cfg_fails.total()), (1, 0));
    driver.start(u64::MAX, 64);
    driver.registers.write_config(0, &[9; 4]);
    assert_eq!((m.activate_fails.total(), m.cfg_fails.total()), (1, 1));
}

#[test]
fn what_goes_back_is_noted_as_written() {
    let mut driver = driver(&ALL);
    let log = Arc::new(husk_virtio::WriteLog::new([(
        0,
        husk_virtio::testing::MEMORY,
    )]));
    driver
        .registers
        .with_core(&mut |core| core.log_writes(Arc::clone(&log)));
    driver.start(u64::MAX, 64);
    let is_noted = |page: u64| {
        let words = &log.bits()[0];
        words[(page / 64) as usize] >> (page % 64) & 1 == 1
    };
    let pages = [FREE as u32, FREE as u32 + 1, FREE as u32 + 70];
    driver.request(0, &[&numbers(&pages)], &[]);
    for page in [0, 1, 70] {
        assert!(is_noted(FREE + page), "{page}");
    }
    for page in [2, 69, 71] {
        assert!(!is_noted(FREE + page), "{page}");
    }
}
