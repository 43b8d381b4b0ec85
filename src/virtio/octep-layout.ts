/**
 * Where things are in an octeon_ep class function, for the driver and for the device: Marvell Octeon endpoints whose firmware emulates virtio.
 *
 * Nothing of it is in the virtio standard. Source: Linux, drivers/vdpa/octeon_ep; the firmware library of Marvell's DPU Accelerator
 * Offload (lib/virtio, lib/pem). The virtio structures are those of 4.1.4, but in a window of memory that the firmware polls: a write is
 * seen some time later, and a register reads as what was written last, whatever the firmware makes of it.
 */
import { Feature, FeatureSet } from './features.ts';

/** PCI ids. The same functions exist with the firmware of a plain NIC: only the window tells which one runs. */
export const OctepId = {
  vendor: 0x177d,
  models: [
    { name: 'CN106K', physical: 0xb900, virtual: 0xb903 },
    { name: 'CN105K', physical: 0xba00, virtual: 0xba03 },
    { name: 'CN103K', physical: 0xbd00, virtual: 0xbd03 },
  ],
} as const;

export const OctepBar = { registers: 0, window: 4 } as const;

/** Registers of BAR 0, 64 bits each. */
export const OctepRegister = {
  /** Bits 51:48: rings of the function, each of which has an interrupt. */
  inputControl: 0x10000,
  /** The mailbox in which the driver of the physical function leaves `READY_MARK` for each virtual one; whoever has read it writes 0. */
  ready: 0x10210,
  end: 0x10218,
} as const;

/** Where the interrupts are in the upper half of `inputControl`. */
export const InterruptCount = { shift: 16, mask: 0xf, max: 8 } as const;

export const READY_MARK = 0xbabababa;

/** The start of the window: two words say that the firmware emulates virtio here. */
export const OctepWindow = { signature: 0, capabilities: 0x34 } as const;
export const WINDOW_SIGNATURE = [0xfeedfeed, 0x3355ffaa] as const;

/** Set in what is written to a register that the firmware has to act on; it has when the bit is gone. */
export const AcknowledgeBit = {
  /** `device_status`; the rest of it 0: a reset. */
  reset: 0x80,
  /** `device_feature_select`, `driver_feature_select`, `queue_select`. */
  select: 0x8000,
} as const;

/** The vendor capability in the window's list (4.1.4.8): its data is the virtio device type. */
export const VendorData = { vendorId: 4, id: 6, bar: 7, data: 8, length: 16, deviceType: 0 } as const;

/** From a queue's notification address: the flag that says that an interrupt was for this queue. */
export const CAUSE_FLAG = 4;

/** Without these such a function does not work, whether it offers them or not. */
export const OCTEP_REQUIRED: FeatureSet = FeatureSet.of(
  Feature.VERSION_1,
  Feature.RING_PACKED,
  Feature.NOTIFICATION_DATA,
);

/** What the ids say; null when they are of another function. */
export interface OctepModel {
  readonly name: string;
  readonly virtual: boolean;
}

export function octepModel(identity: { readonly vendorId: number; readonly deviceId: number }): OctepModel | null {
  if (identity.vendorId !== OctepId.vendor) return null;
  for (const { name, physical, virtual } of OctepId.models) {
    if (identity.deviceId === physical) return { name, virtual: false };
    if (identity.deviceId === virtual) return { name, virtual: true };
  }
  return null;
}
