/**
 * How the faults of `faults.ts` that concern packets are made: rules that look at what a driver sends before the
 * device does, and change what a driver receives.
 */
import { addBytes, finish, ipv4PseudoSum } from '../packet/checksum.ts';
import { Ethernet, IpProtocol, Ipv4, Udp } from '../packet/fields.ts';
import { ResourceType } from '../virtio/admin-wire.ts';
import {
  NetHeaderField as F,
  NetHeaderFlag as Flag,
  GsoType,
  type NetHeader,
  type NetHeaderLayout,
} from '../virtio-net/header.ts';
import type { FaultName, FaultSet } from './faults.ts';

/** A packet to send, in the device's own memory. */
interface Sent {
  readonly layout: NetHeaderLayout;
  readonly u8: Uint8Array;
  /** Where header and frame begin. */
  readonly header: number;
  readonly frame: number;
  readonly length: number;
}

/** Fields of the longest header, whether they were negotiated or not (5.1.9). */
const Offsets = { outerTh: 20, innerNh: 22, outerNh: 24 } as const;
const UNKNOWN_FLAG = 0x80;
const SMALL = 1000;

function get16(u8: Uint8Array, at: number): number {
  return u8[at] | (u8[at + 1] << 8);
}

/** Whether an offset in the header leads out of the frame; only headers that have the field. */
function leadsOut({ layout, u8, header, length }: Sent, field: number): boolean {
  return field + 2 <= layout.length && get16(u8, header + field) >= length;
}

function hasWrongChecksum({ u8, frame }: Sent): boolean {
  const ip = frame + Ethernet.length;
  if (u8[ip] !== 0x45 || u8[ip + Ipv4.protocol] !== IpProtocol.udp) return false;
  const udp = ip + Ipv4.minLength;
  const length = (u8[udp + Udp.udpLength] << 8) | u8[udp + Udp.udpLength + 1];
  return finish(addBytes(u8, udp, length, ipv4PseudoSum(u8, ip, IpProtocol.udp, length))) !== 0;
}

/** What happens to a packet that is sent before anything else: false drops it. */
const SENT: Partial<Record<FaultName, (sent: Sent) => boolean>> = {
  'tx-unknown-flag-dropped': ({ u8, header }) => (u8[header] & UNKNOWN_FLAG) === 0,
  'tx-csum-always': ({ u8, header }) => {
    if (get16(u8, header + F.csumStart) !== 0) u8[header] |= Flag.NEEDS_CSUM;
    return true;
  },
  'tx-csum-never': ({ u8, header }) => {
    u8[header] &= ~Flag.NEEDS_CSUM;
    return true;
  },
  'tx-outer-nh-used': (sent) => !leadsOut(sent, Offsets.outerNh),
  'tx-tunnel-offsets-used': (sent) => !leadsOut(sent, Offsets.outerTh) && !leadsOut(sent, Offsets.innerNh),
  'tx-hdr-len-trusted': (sent) => !leadsOut(sent, F.hdrLen),
  'tx-gso-ignored': ({ u8, header }) => {
    u8[header] &= ~(Flag.UDP_TUNNEL_CSUM | Flag.NEEDS_CSUM);
    u8[header + F.gsoType] = GsoType.NONE;
    return true;
  },
  'tx-bad-checksum-dropped': (sent) => (sent.u8[sent.header] & Flag.NEEDS_CSUM) !== 0 || !hasWrongChecksum(sent),
  'tx-resource-used': ({ layout, u8, header }) => {
    const type = layout.resourceType < 0 ? 0 : get16(u8, header + layout.resourceType);
    if (type === ResourceType.NET_IPSEC_OUTB_SA) u8[header] |= layout.security;
    return true;
  },
  'tx-security-ignored': ({ layout, u8, header }) => {
    u8[header] &= ~layout.security;
    return true;
  },
  'tx-first-sa': ({ layout, u8, header }) => {
    if (layout.resourceId >= 0) u8.fill(0, header + layout.resourceId, header + layout.resourceId + 4);
    return true;
  },
  'tx-long-dropped': ({ length }) => length <= SMALL,
};

/** Changes to the header of a packet that is received. */
const RECEIVED: Partial<Record<FaultName, (header: NetHeader) => void>> = {
  'rx-bad-resource': (header) => {
    header.resourceId = 0xfffffff0;
  },
  'rx-security-lie': (header) => {
    header.flags |= Flag.SECURITY;
    header.resourceType = ResourceType.NET_IPSEC_INB_SA;
  },
  'rx-security-missing': without(Flag.SECURITY),
  'rx-error-lie': adds(Flag.SECURITY_ERR),
  'rx-error-missing': without(Flag.SECURITY_ERR),
  'rx-soft-missing': without(Flag.SECURITY_SA_SOFT_EXPIRY_WARN),
  'rx-needs-csum': (header) => {
    header.flags |= Flag.NEEDS_CSUM;
    header.csumStart = 0;
    header.csumOffset = 0;
  },
  'guest-tso-silent': (header) => {
    header.hdrLen = 0;
  },
  'rx-data-valid': adds(Flag.DATA_VALID),
  'rx-rsc-info': adds(Flag.RSC_INFO),
  'rx-tunnel-csum': adds(Flag.UDP_TUNNEL_CSUM),
  'rx-gso-tcpv4': gso(GsoType.TCPV4),
  'rx-gso-udp': gso(GsoType.UDP),
  'rx-gso-tcpv6': gso(GsoType.TCPV6),
  'rx-gso-udp-l4': gso(GsoType.UDP_L4),
  'rx-gso-tunnel': gso(GsoType.UDP_TUNNEL_IPV4 | GsoType.TCPV4),
  'rx-gso-ecn': gso(GsoType.ECN),
  'rx-buffers-zero': (header) => {
    header.numBuffers = 0;
  },
  'rx-buffers-two': (header) => {
    header.numBuffers = 2;
  },
};

function adds(flag: number): (header: NetHeader) => void {
  return (header) => {
    header.flags |= flag;
  };
}

function without(flag: number): (header: NetHeader) => void {
  return (header) => {
    header.flags &= ~flag;
  };
}

function gso(type: number): (header: NetHeader) => void {
  return (header) => {
    header.gsoType = type;
  };
}

export interface FrameFaults {
  /** False: the packet is dropped. May change it. */
  sent(packet: Sent): boolean;
  /** After IPsec: the frame of `length` bytes at `at`. */
  protected(u8: Uint8Array, at: number, length: number): void;
  /** Changes a header before it is written. */
  received(header: NetHeader): void;
  /** Changes a header after it was written at `at`. */
  written(layout: NetHeaderLayout, u8: Uint8Array, at: number): void;
}

/** The rules of `faults` that concern packets; null when there are no faults at all. */
export function frameFaults(faults: FaultSet): FrameFaults | null {
  if (faults.size === 0) return null;
  const names = [...faults];
  const sent = names.flatMap((name) => SENT[name] ?? []);
  const received = names.flatMap((name) => RECEIVED[name] ?? []);
  return {
    sent: (packet) => sent.every((rule) => rule(packet)),
    protected: (u8, at, length) => {
      if (faults.has('ipsec-icv-broken')) u8[at + length - 1] ^= 1;
    },
    received: (header) => {
      for (const rule of received) rule(header);
    },
    written: (layout, u8, at) => {
      const hasField = layout.length >= Offsets.outerNh + 2;
      if (faults.has('rx-outer-nh') && hasField) u8[at + Offsets.outerNh] = Ethernet.length;
    },
  };
}
