use super::*;

const WINDOW: Range<u64> = 0xd000_0000..0xd001_0000;
const SIZE: u32 = 0x4000;

/// A BAR that remembers the last write.
struct Probe {
    config: Mutex<ConfigSpace>,
    last: Mutex<(u64, Vec<u8>)>,
}

impl Probe {
    fn new(size: u32) -> Arc<Self> {
        let config = ConfigSpace::new(&Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 0,
            class: 0xff_0000,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        Arc::new(Self {
            config: Mutex::new(config.with_bar(size).unwrap()),
            last: Mutex::default(),
        })
    }
}

impl Function for Probe {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }
}

impl BusDevice for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        *self.last.lock().unwrap() = (offset, data.to_vec());
    }
}

type Moves = Arc<Mutex<Vec<(Option<u64>, Option<u64>)>>>;

struct Recorder(Moves);

impl Relocate for Recorder {
    fn relocate(&self, from: Option<u64>, to: Option<u64>) {
        self.0.lock().unwrap().push((from, to));
    }
}

/// A bridge with probes; for each where its doorbells went.
struct Setup {
    bridge: Arc<HostBridge>,
    ecam: Arc<Ecam>,
    probes: Vec<(Arc<Probe>, Moves)>,
}

impl Setup {
    fn new(count: usize) -> Self {
        let bridge = HostBridge::new(WINDOW);
        let probes = (1..=count).map(|device| {
            let (probe, moves) = (Probe::new(SIZE), Moves::default());
            let recorder = Box::new(Recorder(moves.clone()));
            let number = bridge.add(probe.clone(), Some(recorder)).unwrap();
            assert_eq!(usize::from(number), device);
            (probe, moves)
        });
        let probes = probes.collect();
        Self {
            ecam: bridge.ecam(),
            bridge,
            probes,
        }
    }

    fn get(&self, device: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.ecam.read(device << 15 | register, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, device: u64, register: u64, value: u32) {
        let data = value.to_le_bytes();
        self.ecam.write(device << 15 | register, &data);
    }

    /// Which probe answers at an address, and at which offset.
    fn answers(&self, address: u64) -> Option<(usize, u64)> {
        let window = self.bridge.window();
        let mark = address.to_le_bytes();
        window.write(address - WINDOW.start, &mark);
        let mut probes = self.probes.iter().enumerate();
        let found = probes.find_map(|(at, (probe, _))| {
            let last = std::mem::take(&mut *probe.last.lock().unwrap());
            (last.1 == mark).then_some((at, last.0))
        });
        let mut data = [0; 2];
        window.read(address - WINDOW.start, &mut data);
        let expected = found.map_or(0xff, |(_, offset)| offset as u8);
        assert_eq!(data, [expected; 2]);
        found
    }

    fn moves(&self, probe: usize) -> Vec<(Option<u64>, Option<u64>)> {
        std::mem::take(&mut *self.probes[probe].1.lock().unwrap())
    }
}

#[test]
fn a_scan_of_the_bus_finds_the_bridge_and_the_functions_and_nothing_else() {
    let setup = Setup::new(2);
    let mut found = Vec::new();
    for number in 0..256 {
        let mut data = [0; 4];
        setup.ecam.read(number << 12, &mut data);
        if data != [0xff; 4] {
            found.push((number, u32::from_le_bytes(data)));
        }
    }
    let wanted = [(0, 0x0008_1b36), (8, 0x5678_1234), (16, 0x5678_1234)];
    assert_eq!(found, wanted);
    assert_eq!(setup.get(0, 8) >> 8, 0x06_00_00, "a host bridge");
    assert_eq!(
        setup.get(1, 0x100),
        0,
        "no extended capabilities in what is there"
    );
    assert_eq!(setup.get(3, 0x100), u32::MAX);
}

#[test]
fn bars_are_assigned_apart_and_answer_at_once() {
    let setup = Setup::new(4);
    for device in 1..=4 {
        let address = WINDOW.start + (device - 1) * u64::from(SIZE);
        assert_eq!(u64::from(setup.get(device, 0x10)), address);
        let probe = device as usize - 1;
        assert_eq!(setup.moves(probe), [(None, Some(address))]);
        assert_eq!(setup.answers(address + 0x123), Some((probe, 0x123)));
    }
    let more = setup.bridge.add(Probe::new(0x1000), None);
    assert_eq!(more, Err(Error::Window(0x1000)));
    assert_eq!(setup.get(5, 0), u32::MAX);
}

#[test]
fn sizing_a_bar_moves_no_doorbell() {
    let setup = Setup::new(2);
    setup.moves(0);
    setup.set(1, 4, 0);
    assert_eq!(setup.answers(WINDOW.start), None);
    let bar = setup.get(1, 0x10);
    setup.set(1, 0x10, u32::MAX);
    assert_eq!(setup.get(1, 0x10), !(SIZE - 1));
    setup.set(1, 0x10, bar);
    setup.set(1, 4, 2);
    // Without turning decoding off, as some do.
    setup.set(1, 0x10, u32::MAX);
    assert_eq!(setup.answers(WINDOW.start), None);
    setup.set(1, 0x10, bar);
    assert_eq!(setup.answers(WINDOW.start), Some((0, 0)));
    assert_eq!(setup.moves(0), []);
}

#[test]
fn a_bar_answers_where_the_guest_puts_it_and_its_doorbells_follow() {
    let setup = Setup::new(2);
    setup.moves(0);
    setup.set(1, 0x10, 0xd000_c000);
    assert_eq!(setup.answers(0xd000_c010), Some((0, 0x10)));
    assert_eq!(setup.answers(WINDOW.start), None);
    let (old, new) = (Some(WINDOW.start), Some(0xd000_c000));
    assert_eq!(setup.moves(0), [(old, None), (None, new)]);
}

#[test]
fn a_bar_over_another_or_outside_the_window_answers_nowhere_until_there_is_room() {
    let setup = Setup::new(2);
    let (first, second) = (WINDOW.start, WINDOW.start + u64::from(SIZE));
    setup.moves(0);
    setup.moves(1);
    for outside in [0, 0xcfff_c000, 0xd001_0000, 0xffff_c000, 0xe000_0000] {
        setup.set(1, 0x10, outside);
        assert_eq!(setup.answers(first), None, "{outside:#x}");
    }
    setup.set(1, 0x10, second as u32);
    assert_eq!(setup.answers(second), Some((1, 0)), "who is there stays");
    assert_eq!((setup.moves(0), setup.moves(1)), (vec![], vec![]));
    // The other one turns decoding off: its place is free, and its doorbells give way.
    setup.set(2, 4, 0);
    assert_eq!(setup.answers(second), Some((0, 0)));
    assert_eq!(setup.moves(0), [(Some(first), None), (None, Some(second))]);
    assert_eq!(setup.moves(1), [(Some(second), None)]);
    setup.set(2, 4, 2);
    assert_eq!(setup.answers(second), Some((0, 0)));
    setup.set(2, 0x10, first as u32);
    assert_eq!(setup.answers(first), Some((1, 0)));
    assert_eq!(setup.moves(1), [(None, Some(first))]);
}

#[test]
fn two_bars_can_change_places() {
    let setup = Setup::new(2);
    let (first, second) = (WINDOW.start, WINDOW.start + u64::from(SIZE));
    setup.set(1, 0x10, second as u32);
    setup.set(2, 0x10, first as u32);
    assert_eq!(setup.answers(first), Some((1, 0)));
    assert_eq!(setup.answers(second), Some((0, 0)));
}

#[test]
fn there_are_32_device_numbers() {
    let bridge = HostBridge::new(0xd000_0000..0xe000_0000);
    for device in 1..32 {
        assert_eq!(bridge.add(Probe::new(0x4000), None), Ok(device));
    }
    assert_eq!(bridge.add(Probe::new(0x4000), None), Err(Error::Full));
}

#[test]
fn no_access_to_the_bus_can_break_it() {
    let setup = Setup::new(3);
    let window = setup.bridge.window();
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..50_000 {
        let offset = match random() % 4 {
            0 => random(),
            1 => random() % (1 << 20),
            // The headers of the functions, and the ends of their spaces.
            2 => ((random() % 5) << 15) + random() % 0x44,
            _ => ((random() % 5) << 15) + 0xffc + random() % 4,
        };
        let mut data = random().to_le_bytes();
        if random() % 2 == 0 {
            data = (0xd000_0000 + random() % 0x2_0000).to_le_bytes();
        }
        let length = 1 + (random() % 8) as usize;
        match random() % 4 {
            0 => setup.ecam.read(offset, &mut data[..length]),
            1 => window.read(random() % 0x1_0004, &mut data[..length]),
            2 => window.write(random() % 0x1_0004, &data[..length]),
            _ => setup.ecam.write(offset, &data[..length]),
        }
        let table = setup.bridge.placed.read().unwrap();
        for (at, one) in table.iter().enumerate() {
            assert!(one.range.start >= WINDOW.start && one.range.end <= WINDOW.end);
            let rest = table.iter().skip(at + 1);
            assert!(rest.into_iter().all(|two| !overlap(&one.range, &two.range)));
        }
    }
    for device in 1..=3 {
        assert_eq!(setup.get(device, 0), 0x5678_1234);
    }
}

#[test]
fn a_function_that_is_removed_leaves_nothing_and_its_place_is_filled_again() {
    let setup = Setup::new(3);
    let bar = u64::from(setup.get(2, 0x10) & !0xf);
    assert_eq!(setup.answers(bar), Some((1, 0)));
    setup.moves(1);
    setup.bridge.remove(2);
    assert_eq!(setup.get(2, 0), u32::MAX);
    assert_eq!(setup.answers(bar), None);
    assert_eq!(setup.moves(1), [(Some(bar), None)]);
    // Not once more, not the bridge itself, and nothing that is not there.
    for device in [2, 0, 31, 255] {
        setup.bridge.remove(device);
    }
    assert_eq!(setup.get(0, 0), 0x0008_1b36);
    setup.set(2, 0x10, bar as u32);
    // The others stay, and the free place is taken first.
    assert_ne!(setup.get(1, 0), u32::MAX);
    assert_ne!(setup.get(3, 0), u32::MAX);
    let new = Probe::new(SIZE);
    assert_eq!(setup.bridge.add(new.clone(), None), Ok(2));
    assert_eq!(u64::from(setup.get(2, 0x10) & !0xf), bar);
    setup.bridge.window().write(bar - WINDOW.start + 8, &[7]);
    assert_eq!(*new.last.lock().unwrap(), (8, vec![7]));
}
