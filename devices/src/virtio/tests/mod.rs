//! The list of all virtio devices, each with its bench, for the tests that every device must pass.

mod balloon;
mod block;
mod console;
mod net;
mod rng;

crate::testing::suspendable::suspendable_virtio_tests! {
    Rng => rng_tests: crate::virtio::tests::rng::RngBench,
    Console => console_tests: crate::virtio::tests::console::ConsoleBench,
    Block => block_tests: crate::virtio::tests::block::BlockBench,
    Balloon => balloon_tests: crate::virtio::tests::balloon::BalloonBench,
    Net => net_tests: crate::virtio::tests::net::NetBench,
}
