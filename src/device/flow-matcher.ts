/**
 * Matching packets against flow filter rules (Virtio 1.4, 5.1.9.6).
 *
 * From the group with the highest priority to the lowest, within a group from the rule with the highest priority,
 * until one matches. The IPv6 next-header field is that of the last extension header, as the standard says.
 * Neighbouring rules of one classifier differ only in their keys: such a run is looked up in a hash table, so that a
 * rule for each of thousands of SAs costs no more than one.
 *
 * Left out: VLAN tags are not skipped, so a tagged frame matches as what its outer EtherType says.
 */
import { randomBytes } from 'node:crypto';
import {
  Ethernet,
  EtherType,
  IpProtocol,
  Ipv4,
  Ipv4Fragment,
  Ipv6,
  Ipv6Extension,
  Ipv6Fragment,
} from '../packet/fields.ts';
import { type FlowRule, type FlowSelector, SelectorType } from '../virtio-net/flow-filter-wire.ts';

/** What `match` returns when no rule applies; else the index of a rule. */
export const NO_MATCH = -1;

/** Runs of at least this many rules get a hash table. */
const HASHED_RUN = 8;

/** A rule with what it depends on. */
export interface MatcherRule {
  readonly id: number;
  readonly rule: FlowRule;
  readonly groupPriority: number;
  readonly selectors: readonly FlowSelector[];
}

/** Neighbouring rules of one classifier. */
interface Run {
  readonly first: number;
  readonly count: number;
  /** The first rule's tests: types, offsets and masks are those of all. */
  readonly shape: readonly SelectorTest[];
  /** Open addressing, rule index + 1 or 0; null for a short run. */
  readonly table: Int32Array | null;
}

export class RuleMatcher {
  /** By rule, in the order of matching. */
  readonly actions: Uint8Array;
  readonly queues: Uint16Array;
  readonly #tests: readonly (readonly SelectorTest[])[];
  readonly #runs: readonly Run[];

  constructor(rules: readonly MatcherRule[]) {
    // Rules of one priority may be applied in any order: those of one classifier stand together.
    const ordered = [...rules].sort(
      (a, b) =>
        b.groupPriority - a.groupPriority ||
        b.rule.priority - a.rule.priority ||
        a.rule.classifierId - b.rule.classifierId ||
        a.id - b.id,
    );
    this.actions = Uint8Array.from(ordered, ({ rule }) => rule.action);
    this.queues = Uint16Array.from(ordered, ({ rule }) => rule.queueIndex);
    this.#tests = ordered.map(({ rule, selectors }) => makeTests(selectors, rule.key));
    this.#runs = this.#makeRuns(ordered);
  }

  #makeRuns(ordered: readonly MatcherRule[]): Run[] {
    const runs: Run[] = [];
    for (let first = 0; first < ordered.length; ) {
      let end = first + 1;
      while (end < ordered.length && ordered[end].rule.classifierId === ordered[first].rule.classifierId) end++;
      const count = end - first;
      const table = count < HASHED_RUN ? null : this.#makeTable(first, end);
      runs.push({ first, count, shape: this.#tests[first], table });
      first = end;
    }
    return runs;
  }

  /** Of rules with one key the first is entered: no other of them is ever found, and thousands would be a long way to what is behind them. */
  #makeTable(first: number, end: number): Int32Array {
    const size = 2 ** Math.ceil(Math.log2(2 * (end - first)));
    const table = new Int32Array(size);
    for (let r = first; r < end; r++) {
      let slot = hashKeys(this.#tests[r]) & (size - 1);
      while (table[slot] !== 0 && !hasSameKeys(this.#tests[table[slot] - 1], this.#tests[r])) {
        slot = (slot + 1) & (size - 1);
      }
      if (table[slot] === 0) table[slot] = r + 1;
    }
    return table;
  }

  /**
   * hot: the first rule that matches the frame of `length` bytes at `at`, or `NO_MATCH`. Reads nothing beyond the
   * frame.
   */
  match(u8: Uint8Array, at: number, length: number): number {
    const end = at + length;
    const found = locate(u8, at, end);
    for (let i = 0; i < this.#runs.length; i++) {
      const run = this.#runs[i];
      const rule = run.table === null ? this.#scan(run, u8, at, end, found) : this.#lookUp(run, u8, at, end, found);
      if (rule !== NO_MATCH) return rule;
    }
    return NO_MATCH;
  }

  /** hot: */
  #scan(run: Run, u8: Uint8Array, at: number, end: number, found: Layers): number {
    for (let r = run.first; r < run.first + run.count; r++) {
      if (matchesAll(this.#tests[r], u8, at, end, found)) return r;
    }
    return NO_MATCH;
  }

  /** hot: */
  #lookUp(run: Run, u8: Uint8Array, at: number, end: number, found: Layers): number {
    const table = run.table;
    if (table === null || !hasLayers(run.shape, at, end, found)) return NO_MATCH;
    const mask = table.length - 1;
    let slot = hashPacket(run.shape, u8, at, found) & mask;
    while (table[slot] !== 0) {
      const rule = table[slot] - 1;
      if (matchesAll(this.#tests[rule], u8, at, end, found)) return rule;
      slot = (slot + 1) & mask;
    }
    return NO_MATCH;
  }
}

/** One selector with its key, made for matching: only the bytes whose mask is not zero. */
interface SelectorTest {
  readonly type: number;
  readonly length: number;
  readonly offsets: Uint8Array;
  readonly masks: Uint8Array;
  /** Key bytes, masked. */
  readonly keys: Uint8Array;
}

function makeTests(selectors: readonly FlowSelector[], key: Uint8Array): SelectorTest[] {
  let at = 0;
  return selectors.map((selector) => {
    const part = key.subarray(at, at + selector.mask.length);
    at += selector.mask.length;
    return makeTest(selector, part);
  });
}

function makeTest(selector: FlowSelector, key: Uint8Array): SelectorTest {
  const offsets = [...selector.mask.keys()].filter((i) => selector.mask[i] !== 0);
  return {
    type: selector.type,
    length: selector.mask.length,
    offsets: Uint8Array.from(offsets),
    masks: Uint8Array.from(offsets, (i) => selector.mask[i]),
    keys: Uint8Array.from(offsets, (i) => key[i] & selector.mask[i]),
  };
}

/** Where the headers of the packet being matched are: one object for all packets. */
const layers = { etherType: 0, ip: 0, protocol: -1, transport: 0 };
type Layers = typeof layers;

/** Bound on extension headers: more is no packet to match. */
const MAX_EXTENSIONS = 16;

/** hot: finds network and transport header. `protocol` is -1 when there is no transport header to match. */
function locate(u8: Uint8Array, at: number, end: number): Layers {
  layers.protocol = -1;
  layers.etherType = 0;
  if (at + Ethernet.length > end) return layers;
  layers.etherType = (u8[at + Ethernet.type] << 8) | u8[at + Ethernet.type + 1];
  const ip = at + Ethernet.length;
  layers.ip = ip;
  if (layers.etherType === EtherType.ipv4) {
    if (ip + Ipv4.minLength > end || u8[ip] >>> 4 !== 4) layers.etherType = 0;
    else locateIpv4(u8, ip);
  } else if (layers.etherType === EtherType.ipv6) {
    if (ip + Ipv6.length > end || u8[ip] >>> 4 !== 6) layers.etherType = 0;
    else locateIpv6(u8, ip, end);
  }
  return layers;
}

/** hot: */
function locateIpv4(u8: Uint8Array, ip: number): void {
  const headerLength = (u8[ip] & 0xf) * 4;
  if (headerLength < Ipv4.minLength) {
    layers.etherType = 0;
    return;
  }
  layers.protocol = u8[ip + Ipv4.protocol];
  const fragment = (u8[ip + Ipv4.flagsFragment] << 8) | u8[ip + Ipv4.flagsFragment + 1];
  // A later fragment has no transport header.
  layers.transport = (fragment & Ipv4Fragment.offsetMask) === 0 ? ip + headerLength : -1;
}

/** hot: */
function locateIpv6(u8: Uint8Array, ip: number, end: number): void {
  let next = u8[ip + Ipv6.nextHeader];
  let at = ip + Ipv6.length;
  for (let i = 0; i < MAX_EXTENSIONS; i++) {
    const isExtension =
      next === IpProtocol.hopByHop || next === IpProtocol.routing || next === IpProtocol.destinationOptions;
    const isFragment = next === IpProtocol.fragment;
    if (!isExtension && !isFragment) {
      layers.protocol = next;
      layers.transport = at;
      return;
    }
    if (at + Ipv6Extension.unit > end) break;
    if (
      isFragment &&
      (((u8[at + Ipv6Fragment.offsetMore] << 8) | u8[at + Ipv6Fragment.offsetMore + 1]) & Ipv6Fragment.offsetMask) !== 0
    ) {
      layers.protocol = u8[at];
      layers.transport = -1;
      return;
    }
    next = u8[at + Ipv6Extension.nextHeader];
    at += isFragment ? Ipv6Extension.unit : (u8[at + Ipv6Extension.lengthUnits] + 1) * Ipv6Extension.unit;
  }
  layers.protocol = -1;
  layers.transport = -1;
}

/** hot: */
function matchesAll(
  tests: readonly SelectorTest[],
  u8: Uint8Array,
  frame: number,
  end: number,
  found: Layers,
): boolean {
  for (let i = 0; i < tests.length; i++) {
    const test = tests[i];
    const at = headerOf(test, frame, end, found);
    if (at < 0 || !matchesOne(test, u8, at, found)) return false;
  }
  return true;
}

/** hot: */
function hasLayers(tests: readonly SelectorTest[], frame: number, end: number, found: Layers): boolean {
  for (let i = 0; i < tests.length; i++) if (headerOf(tests[i], frame, end, found) < 0) return false;
  return true;
}

/** hot: where the header that a selector is about begins; -1 when the packet has none, or not all of it. */
function headerOf(test: SelectorTest, frame: number, end: number, found: Layers): number {
  let at = frame;
  if (test.type === SelectorType.ipv4) {
    if (found.etherType !== EtherType.ipv4) return -1;
    at = found.ip;
  } else if (test.type === SelectorType.ipv6) {
    if (found.etherType !== EtherType.ipv6) return -1;
    at = found.ip;
  } else if (test.type !== SelectorType.eth) {
    if (found.protocol !== TRANSPORT[test.type] || found.transport < 0) return -1;
    at = found.transport;
  }
  return at + test.length > end ? -1 : at;
}

/** FNV-1a, 32 bits; where it starts is nobody's to know, or a driver could choose keys that all meet in one place. */
const FNV = { start: randomBytes(4).readInt32LE(), prime: 0x01000193 } as const;

/** Whether two rules of one classifier match the same packets. */
function hasSameKeys(a: readonly SelectorTest[], b: readonly SelectorTest[]): boolean {
  return a.every(({ keys }, i) => keys.every((key, k) => key === b[i].keys[k]));
}

/** The hash of a rule's masked key bytes. */
function hashKeys(tests: readonly SelectorTest[]): number {
  let hash: number = FNV.start;
  for (const { keys } of tests) for (const key of keys) hash = Math.imul(hash ^ key, FNV.prime);
  return (hash ^ (hash >>> 15)) >>> 0;
}

/** hot: the same of a packet that has all the headers. */
function hashPacket(tests: readonly SelectorTest[], u8: Uint8Array, frame: number, found: Layers): number {
  let hash: number = FNV.start;
  for (let i = 0; i < tests.length; i++) {
    const test = tests[i];
    const at = headerOf(test, frame, u8.length, found);
    for (let b = 0; b < test.offsets.length; b++) {
      const value = fieldByte(test, test.offsets[b], u8, at, found) & test.masks[b];
      hash = Math.imul(hash ^ value, FNV.prime);
    }
  }
  return (hash ^ (hash >>> 15)) >>> 0;
}

/** Protocol number of a selector type. */
const TRANSPORT: readonly number[] = [-1, -1, -1, -1, IpProtocol.tcp, IpProtocol.udp, IpProtocol.esp];

/** hot: */
function matchesOne(test: SelectorTest, u8: Uint8Array, at: number, found: Layers): boolean {
  const { offsets, masks, keys } = test;
  for (let i = 0; i < offsets.length; i++) {
    if ((fieldByte(test, offsets[i], u8, at, found) & masks[i]) !== keys[i]) return false;
  }
  return true;
}

/** hot: a byte of the header at `at`; for the next header of IPv6, the last of the chain. */
function fieldByte(test: SelectorTest, offset: number, u8: Uint8Array, at: number, found: Layers): number {
  return test.type === SelectorType.ipv6 && offset === Ipv6.nextHeader ? found.protocol : u8[at + offset];
}
