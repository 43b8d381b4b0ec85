/** What the guest holds besides the package itself. */

/** What the base of the image is mounted with; the driver of its disk (NVMe) is part of the kernel. */
export const FILE_SYSTEM_MODULE = 'erofs';

/** Every module that a scenario may load; what they depend on comes along. */
export const GUEST_MODULES = [
  'virtio_pci',
  'virtio_net',
  'vfio_pci',
  'vfio_iommu_type1',
  // The IPsec of the kernel, and the algorithms that the matrix uses.
  'xfrm_user',
  'esp4',
  'esp6',
  'ah4',
  'ah6',
  'authenc',
  'authencesn',
  'seqiv',
  'echainiv',
  'gcm',
  'ccm',
  'ctr',
  'cmac',
  'xcbc',
  'ghash_generic',
  'chacha20poly1305',
  'chacha_generic',
  'poly1305_generic',
  'sha512_generic',
  'des_generic',
  'crypto_null',
  'drbg',
  'jitterentropy_rng',
  // Kernel links to build small networks with.
  'veth',
  'dummy',
  'tun',
] as const;

/** Programs of the tools sysroot that get a command of their own in the guest. */
export const GUEST_TOOLS = { ip: ['sbin/ip', 'usr/sbin/ip'], ethtool: ['sbin/ethtool', 'usr/sbin/ethtool'] } as const;
