/**
 * What the firmware of an octeon_ep class function writes into its window when it starts, and its mailbox. Source: the firmware library of Marvell's DPU
 * Accelerator Offload (lib/virtio).
 */
import { OctepBar, OctepId, OctepWindow, VendorData, WINDOW_SIGNATURE } from '../../virtio/octep-layout.ts';
import {
  CommonCfgLength,
  PCI_CAP_VENDOR,
  VirtioCapField,
  VirtioCapLength,
  VirtioCfgType,
} from '../../virtio/pci-layout.ts';
import type { OctepFault } from './octep-faults.ts';

/** The host's page size, which the firmware is told. */
export const PAGE = 0x1000;
/** Where the firmware puts things: capabilities back to back, none of them aligned. */
export const Place = {
  capabilities: 0x35,
  common: 0x90,
  isr: 0xd0,
  config: 0x100,
  configLength: 64,
  mailbox: 0x140,
  notify: PAGE,
} as const;
/** The mailbox: a request, its status (bit 0: answered; above it an errno), the queue it is about, and the state of that. */
export const Mailbox = { id: 2, signature: 6, status: 8, state: 28, length: 40 } as const;
const MailboxSignature = { request: 0xdead, answer: 0xbeef } as const;
const MailboxRequest = { setState: 1, getState: 2 } as const;
const ANSWERED = 1;
const EINVAL = 22;
/** Of available and of used descriptors: wrap counter 1 in bit 0, and above it index 0. */
const STATE_AT_START = [1, 1] as const;
const CRYPTO_DEVICE = 20;
const NETWORK_DEVICE = 1;

/** Signature and capability list of a function with `queues` queues. */
export function writeWindow(memory: Uint8Array, queues: number, faults: ReadonlySet<OctepFault>): void {
  for (const [i, word] of WINDOW_SIGNATURE.entries()) put(memory, OctepWindow.signature + 4 * i, 4, word);
  const common = { type: VirtioCfgType.COMMON, offset: Place.common, length: CommonCfgLength.full };
  const notify = { type: VirtioCfgType.NOTIFY, offset: Place.notify, length: PAGE * queues };
  const isr = { type: VirtioCfgType.ISR, offset: Place.isr, length: 4 };
  const config = { type: VirtioCfgType.DEVICE, offset: Place.config, length: Place.configLength };
  const list = faults.has('octep-capability-missing') ? [common, notify, config] : [common, notify, isr, config];
  let at: number = Place.capabilities;
  put(memory, OctepWindow.capabilities, 1, at);
  for (const { type, offset, length } of list) {
    const size = type === VirtioCfgType.NOTIFY ? VirtioCapLength.notify : VirtioCapLength.plain;
    const isOff = type === VirtioCfgType.ISR && faults.has('octep-capability-bar');
    const isLong = type === VirtioCfgType.NOTIFY && faults.has('octep-capability-bounds');
    putCapability(memory, at, at + size, size, type);
    put(memory, at + VirtioCapField.bar, 1, isOff ? 2 : OctepBar.window);
    put(memory, at + VirtioCapField.offset, 4, offset);
    put(memory, at + VirtioCapField.structureLength, 4, isLong ? 2 ** 31 : length);
    if (type === VirtioCfgType.NOTIFY) put(memory, at + VirtioCapField.notifyOffMultiplier, 4, PAGE);
    at += size;
  }
  const first = Place.capabilities;
  putCapability(memory, at, faults.has('octep-capability-loop') ? first : 0, VendorData.length, VirtioCfgType.VENDOR);
  put(memory, at + VendorData.vendorId, 2, faults.has('octep-vendor') ? 1 : OctepId.vendor);
  put(memory, at + VendorData.id, 1, VendorData.deviceType);
  put(memory, at + VendorData.data, 1, faults.has('octep-crypto') ? CRYPTO_DEVICE : NETWORK_DEVICE);
  if (faults.has('octep-capability-kind')) put(memory, at + VirtioCapField.vendor, 1, PCI_CAP_VENDOR - 1);
}

function putCapability(memory: Uint8Array, at: number, next: number, length: number, type: number): void {
  put(memory, at + VirtioCapField.vendor, 1, PCI_CAP_VENDOR);
  put(memory, at + VirtioCapField.next, 1, next);
  put(memory, at + VirtioCapField.length, 1, length);
  put(memory, at + VirtioCapField.cfgType, 1, type);
}

/** Answers a request of the driver for the state of a queue, which is to be kept or told; any is taken, and each queue is always at its start. */
export function answerMailbox(memory: Uint8Array): void {
  const at = Place.mailbox;
  if (get(memory, at + Mailbox.signature, 2) !== MailboxSignature.request) return;
  const request = get(memory, at + Mailbox.id, 2);
  const known = request === MailboxRequest.setState || request === MailboxRequest.getState;
  if (request === MailboxRequest.getState) {
    for (const [i, half] of STATE_AT_START.entries()) put(memory, at + Mailbox.state + 2 * i, 2, half);
  }
  put(memory, at + Mailbox.id, 2, 0);
  put(memory, at + Mailbox.signature, 2, MailboxSignature.answer);
  put(memory, at + Mailbox.status, 4, ANSWERED | ((known ? 0 : EINVAL) << 1));
}

/** `width` bytes, little-endian. */
export function get(bytes: Uint8Array, at: number, width: number): number {
  let value = 0;
  for (let i = width - 1; i >= 0; i--) value = value * 256 + bytes[at + i];
  return value;
}

export function put(bytes: Uint8Array, at: number, width: number, value: number): void {
  for (let i = 0; i < width; i++) bytes[at + i] = value >>> (8 * i);
}
