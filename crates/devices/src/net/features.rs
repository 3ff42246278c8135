//! The bits of 5.1.3, by short names.

use virtio_bindings::bindings::virtio_net as bits;

pub const CSUM: u32 = bits::VIRTIO_NET_F_CSUM;
pub const GUEST_CSUM: u32 = bits::VIRTIO_NET_F_GUEST_CSUM;
pub const MTU: u32 = bits::VIRTIO_NET_F_MTU;
pub const MAC: u32 = bits::VIRTIO_NET_F_MAC;
pub const GUEST_TSO4: u32 = bits::VIRTIO_NET_F_GUEST_TSO4;
pub const GUEST_TSO6: u32 = bits::VIRTIO_NET_F_GUEST_TSO6;
pub const GUEST_ECN: u32 = bits::VIRTIO_NET_F_GUEST_ECN;
pub const HOST_TSO4: u32 = bits::VIRTIO_NET_F_HOST_TSO4;
pub const HOST_TSO6: u32 = bits::VIRTIO_NET_F_HOST_TSO6;
pub const HOST_ECN: u32 = bits::VIRTIO_NET_F_HOST_ECN;
pub const MRG_RXBUF: u32 = bits::VIRTIO_NET_F_MRG_RXBUF;
pub const STATUS: u32 = bits::VIRTIO_NET_F_STATUS;
pub const CTRL_VQ: u32 = bits::VIRTIO_NET_F_CTRL_VQ;
pub const MQ: u32 = bits::VIRTIO_NET_F_MQ;
pub const GUEST_USO4: u32 = bits::VIRTIO_NET_F_GUEST_USO4;
pub const GUEST_USO6: u32 = bits::VIRTIO_NET_F_GUEST_USO6;
pub const HOST_USO: u32 = bits::VIRTIO_NET_F_HOST_USO;
