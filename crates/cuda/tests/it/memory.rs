//! Device memory and copies.

use specforge_cuda::Error;

use crate::support::gpu;

/// Bytes that differ from place to place.
fn pattern(n: usize, seed: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 31 + i / 251 + seed) as u8).collect()
}

#[test]
fn bytes_come_back_as_they_went() {
    let Some(gpu) = gpu() else { return };
    // Small copies and large ones go different ways.
    for n in [0, 1, 3, 4096, (1 << 20) - 1, 1 << 20, (5 << 20) + 7] {
        let there = gpu.upload(&pattern(n, n)).unwrap();
        assert_eq!(there.bytes(), n);
        assert!(gpu.read_back(there.address(), n).unwrap().wait().unwrap() == pattern(n, n), "{n} bytes");
    }
}

#[test]
fn copies_in_flight_keep_what_they_carry() {
    let Some(gpu) = gpu() else { return };
    // Uploaded, copied, read and dropped without waiting; buffers and memory are used again and again.
    let reads: Vec<_> = (0..200)
        .map(|i| {
            let n = [100, 5000, 2 << 20][i % 3];
            let (from, to) = (gpu.upload(&pattern(n, i)).unwrap(), gpu.alloc(n).unwrap());
            gpu.copy(to.address(), from.address(), n).unwrap();
            (i, n, gpu.read_back(to.address(), n).unwrap())
        })
        .collect();
    for (i, n, read) in reads.iter().rev() {
        assert!(read.wait().unwrap() == pattern(*n, *i), "copy {i} of {n} bytes");
    }
}

#[test]
fn copies_of_several_threads_do_not_mix() {
    let Some(gpu) = gpu() else { return };
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                for i in 0..50 {
                    let n = [64, 3000, 1 << 20][(i + thread) % 3];
                    let there = gpu.upload(&pattern(n, thread * 100 + i)).unwrap();
                    let read = gpu.read_back(there.address(), n).unwrap();
                    drop(there);
                    assert!(read.wait().unwrap() == pattern(n, thread * 100 + i), "{thread}: {i}");
                }
            });
        }
    });
}

#[test]
fn memory_is_zeroed_and_copied() {
    let Some(gpu) = gpu() else { return };
    let there = gpu.upload(&pattern(1000, 1)).unwrap();
    gpu.fill_zero(there.address() + 10, 20).unwrap();
    gpu.copy(there.address() + 500, there.address(), 40).unwrap();
    gpu.copy(there.address(), there.address(), 0).unwrap();
    let mut want = pattern(1000, 1);
    want[10..30].fill(0);
    want.copy_within(0..40, 500);
    assert!(gpu.read_back(there.address(), 1000).unwrap().wait().unwrap() == want);
    let zeros = gpu.alloc_zeroed(12_345).unwrap();
    assert!(gpu.read_back(zeros.address(), 12_345).unwrap().wait().unwrap() == [0; 12_345]);
}

#[test]
fn too_much_is_an_error_that_can_be_survived() {
    let Some(gpu) = gpu() else { return };
    let asked = 1 << 50;
    let error = gpu.alloc(asked).unwrap_err();
    let Error::OutOfMemory { asked: got, total, .. } = error else { panic!("{error}") };
    assert_eq!((got, total), (asked, gpu.properties().memory));
    let memory = gpu.alloc(100 << 20).unwrap();
    let usage = gpu.usage();
    assert!(
        usage.held >= 100 << 20 && usage.peak >= usage.held.min(100 << 20) && usage.reserved >= 100 << 20
    );
    drop(memory);
    gpu.release_kept().unwrap();
    assert!(gpu.upload(&[1, 2, 3]).is_ok());
}
