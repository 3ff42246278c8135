//! Numbered places, whose numbers are not used twice.

/// Places for up to 2^32 things.
pub struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

struct Slot<T> {
    /// Of what is in it or comes next, below 2^31.
    generation: u32,
    content: Option<T>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    /// How many are taken.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Put `content` somewhere: the number, below 2^63.
    pub fn insert(&mut self, content: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                content: None,
            });
            self.slots.len() as u32 - 1
        });
        let mut number = u64::from(index);
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.content = Some(content);
            number |= u64::from(slot.generation) << 32;
        }
        number
    }

    /// What has this number, if it is still there.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        self.slot(number)?.content.as_mut()
    }

    /// Make what has this number into something else, with the same number.
    pub fn change(&mut self, number: u64, change: impl FnOnce(T) -> T) {
        if let Some(slot) = self.slot(number) {
            slot.content = slot.content.take().map(change);
        }
    }

    /// Take out what has this number.
    pub fn remove(&mut self, number: u64) -> Option<T> {
        let slot = self.slot(number)?;
        let content = slot.content.take()?;
        slot.generation = (slot.generation + 1) & (u32::MAX >> 1);
        self.free.push(number as u32);
        Some(content)
    }

    /// The number of what is in the place `index`, for going through all of them; None behind the last place.
    pub fn at(&self, index: usize) -> Option<u64> {
        let slot = self.slots.get(index)?;
        Some(index as u64 | u64::from(slot.generation) << 32)
    }

    fn slot(&mut self, number: u64) -> Option<&mut Slot<T>> {
        let slot = self.slots.get_mut(number as u32 as usize)?;
        (u64::from(slot.generation) == number >> 32).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_number_does_not_find_what_came_after() {
        let mut slots = Slots::default();
        let (a, b) = (slots.insert('a'), slots.insert('b'));
        assert_eq!(slots.remove(a), Some('a'));
        let c = slots.insert('c');
        assert_ne!(a, c);
        assert_eq!(slots.get_mut(a), None);
        assert_eq!(slots.remove(a), None);
        assert_eq!(slots.get_mut(b), Some(&mut 'b'));
        assert_eq!(slots.len(), 2);
        let all = (0..).map_while(|index| slots.at(index));
        let mut all: Vec<u64> = all.collect();
        all.sort_unstable();
        let mut wanted = [b, c];
        wanted.sort_unstable();
        assert_eq!(all, wanted);
    }
}
