/**
 * Software IPsec over a capture, packet by packet in bursts: what `vipsec esp` does between two files.
 *
 * A packet goes first to the inbound SAs (when there are any), then to the outbound policy. What it does not protect,
 * verify or drop is copied as it is. The order of packets is kept. Memory is one burst of the largest packets there are.
 */
import { InputError, IpsecError } from '../src/errors.ts';
import type { EngineName } from '../src/fallback/engines/engine.ts';
import { SoftwareIpsec } from '../src/fallback/software.ts';
import { VERDICTS, Verdict, verdictNames } from '../src/fallback/verdict.ts';
import { OutboundPolicy } from '../src/ipsec/policy.ts';
import type { SecurityAssociation } from '../src/ipsec/sa.ts';
import type { CaptureRecord } from '../src/packet/capture.ts';
import type { CaptureReader, CaptureWriter } from '../src/packet/capture-file.ts';
import { Ethernet, EtherType, LinkType, Vlan } from '../src/packet/fields.ts';
import { PacketPool } from '../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../src/sys/memory.ts';

/** Packets at a time. */
const BURST = 64;

/** VLAN tags that are looked behind: as many as a link header of `SoftwareIpsec` can hold. What has more might be IP, and is dropped. */
const MAX_TAGS = 12;

/** A slot holds the largest IP packet (IPv6: 65535 bytes behind a header of 40), its link header, and what tunnels add before and behind. */
const Slot = {
  stride: 66 * 1024,
  headroom: 256,
  largest: 65_535 + 40 + Ethernet.length + MAX_TAGS * Vlan.length,
} as const;

/** What the output's link type cannot carry: an IPv6 packet in a capture of IPv4 packets. */
const LINK_TYPE = VERDICTS;

/** Names of everything a packet can be dropped for. */
const dropNames: readonly string[] = [...verdictNames.filter((_, verdict) => isDrop(verdict)), 'link-type'];

function isDrop(verdict: number): boolean {
  return verdict !== Verdict.ok && verdict !== Verdict.notIpsec && verdict !== Verdict.dummy;
}

/** What `vipsec esp --json` prints. */
export interface EspReport {
  in: number;
  out: number;
  protected: number;
  verified: number;
  bypassed: number;
  dropped: Record<string, number>;
  dummy: number;
}

/** Whether a report says that packets were rejected. */
export function anyDropped(report: EspReport): boolean {
  return Object.values(report.dropped).some((count) => count > 0);
}

export class EspPipeline {
  readonly #memory = mapAnonymous(BURST * Slot.stride);
  readonly #pool = new PacketPool(this.#memory, { stride: Slot.stride, headroom: Slot.headroom });
  readonly #ipsec: SoftwareIpsec;
  readonly #policy: OutboundPolicy;
  readonly #inbound: boolean;
  readonly #packets = new Uint32Array(BURST);
  readonly #linkHeader = new Uint32Array(BURST);
  readonly #seconds = new Float64Array(BURST);
  readonly #nanoseconds = new Float64Array(BURST);
  readonly #originalLength = new Float64Array(BURST);
  /** Verdict of each packet of the burst; `bypassed` and the like follow from where it was given. */
  readonly #verdict = new Uint8Array(BURST);
  readonly #touched = new Uint8Array(BURST);
  // The packets of the burst that share a link header, and where they came from.
  readonly #group = new Uint32Array(BURST);
  readonly #groupIndex = new Uint32Array(BURST);
  readonly #groupVerdict = new Uint8Array(BURST);
  readonly #dropped = new Float64Array(VERDICTS + 1);
  /** Of the capture; -1 until the first packet. */
  #linkType = -1;
  readonly report: EspReport = {
    in: 0,
    out: 0,
    protected: 0,
    verified: 0,
    bypassed: 0,
    dropped: {},
    dummy: 0,
  };

  /** Throws `IpsecError` when an SA cannot be done with the engine. */
  constructor(sas: readonly SecurityAssociation[], engine: 'auto' | EngineName) {
    try {
      this.#ipsec = new SoftwareIpsec(this.#pool, { engine });
    } catch (error) {
      unmapMemory(this.#memory);
      throw error;
    }
    try {
      const entries = sas.map((sa, i) => ({ sa, selector: sa.selector, handle: i + 1 }));
      for (const { sa, handle } of entries) this.#ipsec.add(handle, sa);
      this.#policy = new OutboundPolicy(entries.filter(({ sa }) => sa.direction === 'outbound'));
      this.#inbound = sas.some((sa) => sa.direction === 'inbound');
    } catch (error) {
      this.close();
      throw error;
    }
    this.#summarise();
  }

  /** Which engines do the arithmetic, by SA index. */
  engines(count: number): EngineName[] {
    return Array.from({ length: count }, (_, i) => this.#ipsec.counters(i + 1).engine);
  }

  /**
   * Takes up to a burst of packets from `reader` through IPsec into `writer`. Returns false when there was none: at the end of
   * the input, or when `reader` is starved. Throws `InputError` where the input is malformed.
   */
  step(reader: CaptureReader, writer: (linkType: number) => CaptureWriter): boolean {
    const n = this.#load(reader);
    this.#inboundBurst(n);
    this.#outboundBurst(n);
    if (n > 0) this.#store(n, writer(this.#linkType));
    this.#pool.free(this.#packets, n);
    this.#summarise();
    return n > 0;
  }

  /** Wipes keys and unmaps the packets' memory. Idempotent. */
  close(): void {
    this.#ipsec.close();
    unmapMemory(this.#memory);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Fills the burst. Packets that IPsec has nothing to do with get their verdict here. */
  #load(reader: CaptureReader): number {
    const pool = this.#pool;
    const free = pool.allocate(this.#packets, BURST);
    let n = 0;
    while (n < free) {
      const record = reader.next();
      if (record === null) break;
      this.#checkLinkType(record);
      this.report.in++;
      if (record.length > Slot.largest) {
        // No IP packet is that long; a frame that claims to be one cannot be protected and must not pass.
        this.#dropped[Verdict.tooBig]++;
        continue;
      }
      const p = this.#packets[n];
      const at = pool.offset[p];
      pool.u8.set(record.data.subarray(record.offset, record.offset + record.length), at);
      pool.length[p] = record.length;
      this.#seconds[n] = record.seconds;
      this.#nanoseconds[n] = record.nanoseconds;
      this.#originalLength[n] = record.originalLength;
      const header = this.#linkType === LinkType.ethernet ? ethernetHeader(pool.u8, at, record.length) : 0;
      this.#linkHeader[n] = header === TOO_DEEP ? NOT_IP : header;
      this.#verdict[n] = header === TOO_DEEP ? Verdict.malformed : Verdict.notIpsec;
      this.#touched[n] = header === TOO_DEEP ? 1 : 0;
      n++;
    }
    for (let i = n; i < free; i++) {
      this.#group[0] = this.#packets[i];
      pool.free(this.#group, 1);
    }
    return n;
  }

  #checkLinkType(record: CaptureRecord): void {
    if (record.linkType === this.#linkType) return;
    if (this.#linkType >= 0) {
      throw new InputError('CAPTURE_MIXED', 'the capture has interfaces of different link types', {
        hint: 'split it by interface first',
      });
    }
    const supported: readonly number[] = Object.values(LinkType);
    if (!supported.includes(record.linkType)) {
      throw new InputError('LINK_TYPE_UNSUPPORTED', `the capture has link type ${record.linkType}`, {
        hint: `supported: ${Object.entries(LinkType)
          .map(([name, value]) => `${name} (${value})`)
          .join(', ')}`,
      });
    }
    this.#linkType = record.linkType;
  }

  /** Gathers the packets with `linkHeader` that are still untouched; returns how many. */
  #gather(n: number, linkHeader: number): number {
    let count = 0;
    for (let i = 0; i < n; i++) {
      if (this.#linkHeader[i] !== linkHeader || this.#touched[i] !== 0) continue;
      this.#group[count] = this.#packets[i];
      this.#groupIndex[count] = i;
      count++;
    }
    return count;
  }

  #inboundBurst(n: number): void {
    if (!this.#inbound) return;
    for (const linkHeader of new Set(this.#linkHeader.subarray(0, n))) {
      if (linkHeader === NOT_IP) continue;
      const count = this.#gather(n, linkHeader);
      this.#ipsec.unprotect(this.#group, count, linkHeader, this.#groupVerdict);
      for (let k = 0; k < count; k++) {
        const verdict = this.#groupVerdict[k];
        if (verdict === Verdict.notIpsec) continue;
        this.#settle(this.#groupIndex[k], verdict);
        if (verdict === Verdict.ok) this.report.verified++;
      }
    }
  }

  #outboundBurst(n: number): void {
    for (const linkHeader of new Set(this.#linkHeader.subarray(0, n))) {
      if (linkHeader === NOT_IP) continue;
      const candidates = this.#gather(n, linkHeader);
      this.#policy.classify(this.#pool, this.#group, candidates, linkHeader, this.#groupVerdict);
      let count = 0;
      for (let k = 0; k < candidates; k++) {
        const verdict = this.#groupVerdict[k];
        const i = this.#groupIndex[k];
        if (verdict === Verdict.ok) {
          this.#group[count] = this.#packets[i];
          this.#groupIndex[count] = i;
          count++;
        } else if (verdict !== Verdict.notIpsec) {
          this.#settle(i, verdict);
        }
      }
      if (count === 0) continue;
      this.#ipsec.protect(this.#group, count, linkHeader, this.#groupVerdict);
      for (let k = 0; k < count; k++) {
        const verdict = this.#groupVerdict[k];
        // An SA was chosen: whatever did not become protected must not pass.
        this.#settle(this.#groupIndex[k], verdict === Verdict.notIpsec ? Verdict.noSa : verdict);
        if (verdict === Verdict.ok) this.report.protected++;
      }
    }
  }

  #settle(i: number, verdict: number): void {
    this.#verdict[i] = verdict;
    this.#touched[i] = 1;
  }

  #store(n: number, writer: CaptureWriter): void {
    const pool = this.#pool;
    for (let i = 0; i < n; i++) {
      const verdict = this.#verdict[i];
      const p = this.#packets[i];
      const at = pool.offset[p];
      const length = pool.length[p];
      if (verdict === Verdict.dummy) {
        this.report.dummy++;
      } else if (isDrop(verdict)) {
        this.#dropped[verdict]++;
      } else if (verdict === Verdict.ok && !this.#fitsLinkType(pool.u8[at] >>> 4)) {
        this.#dropped[LINK_TYPE]++;
      } else {
        const original = this.#touched[i] === 1 ? length : this.#originalLength[i];
        if (this.#touched[i] === 0) this.report.bypassed++;
        writer.write(pool.u8, at, length, this.#seconds[i], this.#nanoseconds[i], original);
        this.report.out++;
      }
    }
  }

  #fitsLinkType(version: number): boolean {
    if (this.#linkType === LinkType.ipv4) return version === 4;
    return this.#linkType !== LinkType.ipv6 || version === 6;
  }

  #summarise(): void {
    for (const name of dropNames) {
      const index = verdictNames.indexOf(name);
      this.report.dropped[name] = this.#dropped[index < 0 ? LINK_TYPE : index];
    }
  }
}

/** Instead of the length of a link header: the frame does not carry IP. */
const NOT_IP = 0xffffffff;
/** It has more than `MAX_TAGS` VLAN tags. */
const TOO_DEEP = -1;

/** Bytes before the IP header of an Ethernet frame, VLAN tags included, or `NOT_IP`, or `TOO_DEEP`. */
function ethernetHeader(u8: Uint8Array, at: number, length: number): number {
  let end: number = Ethernet.length;
  for (let tags = 0; end <= length; tags++, end += Vlan.length) {
    const type = (u8[at + end - 2] << 8) | u8[at + end - 1];
    if (type === EtherType.ipv4 || type === EtherType.ipv6) return end;
    if (type !== EtherType.vlan && type !== EtherType.serviceVlan) return NOT_IP;
    if (tags === MAX_TAGS) return TOO_DEEP;
  }
  return NOT_IP;
}

/** The pieces that `vipsec esp` must not do: an empty list protects nothing, which nobody asks for. */
export function requireSas(sas: readonly SecurityAssociation[], file: string): void {
  if (sas.length === 0) throw new InputError('SA_FILE_EMPTY', `${file}: sas: has no SA`);
}

/** An SA that the chosen engine cannot do is an error of the input. */
export function asInputError(error: unknown): unknown {
  if (!(error instanceof IpsecError)) return error;
  const hint = error.hint === undefined ? {} : { hint: error.hint };
  return new InputError(error.code, error.message, { ...hint, cause: error });
}
