/**
 * The PCI structures of a modern virtio device (Virtio 1.4, 4.1.3 and 4.1.4), for the driver and for the device.
 */

/** PCI ids (4.1.2): a modern device is `modern` + its type; a transitional one names its type as subsystem id. */
export const VirtioPciId = {
  vendor: 0x1af4,
  transitionalFirst: 0x1000,
  transitionalLast: 0x103f,
  modern: 0x1040,
  modernLast: 0x107f,
} as const;

/** `struct virtio_pci_cap` (4.1.4), and `notify_off_multiplier` that follows it in the notification capability (4.1.4.4). */
export const VirtioCapField = {
  vendor: 0,
  next: 1,
  length: 2,
  cfgType: 3,
  bar: 4,
  id: 5,
  offset: 8,
  structureLength: 12,
  notifyOffMultiplier: 16,
} as const;

/** Bytes of `struct virtio_pci_cap` and of `struct virtio_pci_notify_cap`. */
export const VirtioCapLength = { plain: 16, notify: 20 } as const;

/** PCI's id of a vendor-specific capability. */
export const PCI_CAP_VENDOR = 0x09;

/** `cfg_type` (4.1.4). */
export const VirtioCfgType = {
  COMMON: 1,
  NOTIFY: 2,
  ISR: 3,
  DEVICE: 4,
  PCI: 5,
  SHARED_MEMORY: 8,
  VENDOR: 9,
} as const;

/** `struct virtio_pci_common_cfg` (4.1.4.3). The 64-bit queue addresses are two 32-bit fields, low first. */
export const CommonCfgField = {
  deviceFeatureSelect: 0,
  deviceFeature: 4,
  driverFeatureSelect: 8,
  driverFeature: 12,
  configMsixVector: 16,
  numQueues: 18,
  deviceStatus: 20,
  configGeneration: 21,
  queueSelect: 22,
  queueSize: 24,
  queueMsixVector: 26,
  queueEnable: 28,
  queueNotifyOff: 30,
  queueDesc: 32,
  queueDriver: 40,
  queueDevice: 48,
  queueNotifConfigData: 56,
  queueReset: 58,
  adminQueueIndex: 60,
  adminQueueNum: 62,
} as const;

/** Bytes that a driver cannot do without, and with the fields of RING_RESET and ADMIN_VQ. */
export const CommonCfgLength = { required: 56, full: 64 } as const;

/** `device_status` (2.1). */
export const DeviceStatus = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
  SUSPEND: 16,
  DEVICE_NEEDS_RESET: 64,
  FAILED: 128,
} as const;

/** ISR status bits (4.1.4.5). */
export const IsrBit = { QUEUE: 1, CONFIG: 2 } as const;

/** `VIRTIO_MSI_NO_VECTOR` (4.1.5.1.2): no interrupt for this event. */
export const NO_VECTOR = 0xffff;

/** Device types (5). */
export const DeviceType = { NET: 1 } as const;
