//! A buffer whose start lies where direct I/O wants it.

/// Zeroed bytes that start at a multiple of an alignment.
#[derive(Debug)]
pub(crate) struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    pub(crate) fn new(len: usize, alignment: usize) -> Self {
        let alignment = alignment.max(1);
        let bytes = vec![0; len.saturating_add(alignment)];
        let start = bytes.as_ptr().addr().next_multiple_of(alignment) - bytes.as_ptr().addr();
        Self { bytes, start, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes
            .get(self.start..self.start + self.len)
            .unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
            .get_mut(self.start..self.start + self.len)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_where_it_should() {
        for alignment in [1, 512, 4096] {
            let mut buf = AlignedBuf::new(1000, alignment);
            assert_eq!(buf.bytes().as_ptr().addr() % alignment, 0);
            assert_eq!(buf.bytes_mut().len(), 1000);
        }
        assert_eq!(AlignedBuf::new(0, 512).bytes().len(), 0);
    }
}
