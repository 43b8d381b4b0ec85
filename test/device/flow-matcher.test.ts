import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type MatcherRule, NO_MATCH, RuleMatcher } from '../../src/device/flow-matcher.ts';
import {
  FlowFilterAction,
  type FlowSelector,
  SELECTOR_LENGTH,
  SelectorType,
} from '../../src/virtio-net/flow-filter-wire.ts';
import { runs } from '../depth.ts';
import { udpFrame } from './helpers/net-driver.ts';

const T = SelectorType;

function selector(type: number, ...ones: readonly (readonly [number, number])[]): FlowSelector {
  const mask = new Uint8Array(SELECTOR_LENGTH[type]);
  for (const [from, length] of ones) mask.fill(0xff, from, from + length);
  return { type, flags: 0, mask };
}

function rule(
  id: number,
  selectors: FlowSelector[],
  keys: readonly (readonly [number, number])[],
  change = {},
): MatcherRule {
  const key = new Uint8Array(selectors.reduce((sum, { mask }) => sum + mask.length, 0));
  for (const [at, value] of keys) key[at] = value;
  const base = { groupId: 0, classifierId: 0, priority: 1, action: FlowFilterAction.drop, queueIndex: id, key };
  return { id, rule: { ...base, ...change }, groupPriority: 0, selectors };
}

/** Index of queue of the rule that matched, which is its id here. */
function match(rules: MatcherRule[], frame: Uint8Array): number {
  const memory = new Uint8Array(frame.length + 64).fill(0xff);
  memory.set(frame, 32);
  const matcher = new RuleMatcher(rules);
  const found = matcher.match(memory, 32, frame.length);
  return found === NO_MATCH ? NO_MATCH : matcher.queues[found];
}

/** ETH type and IP protocol, and the first four bytes of ESP. */
const ESP4 = [selector(T.eth, [12, 2]), selector(T.ipv4, [9, 1]), selector(T.esp, [0, 4])];
const ESP6 = [selector(T.eth, [12, 2]), selector(T.ipv6, [6, 1]), selector(T.esp, [0, 4])];
const esp4 = (id: number, spi: number, change = {}) =>
  rule(
    id,
    ESP4,
    [
      [12, 8],
      [23, 50],
      [34, spi >>> 24],
      [35, (spi >>> 16) & 255],
      [36, (spi >>> 8) & 255],
      [37, spi & 255],
    ],
    change,
  );
const esp6 = (id: number, spi: number, change = {}) =>
  rule(
    id,
    ESP6,
    [
      [12, 0x86],
      [13, 0xdd],
      [20, 50],
      [57, spi],
    ],
    { classifierId: 1, ...change },
  );

function espFrame4(spi: number, options = 0): Uint8Array {
  const frame = udpFrame(100);
  frame[14] = 0x45 + options;
  frame[23] = 50;
  frame.set([spi >>> 24, spi >>> 16, spi >>> 8, spi], 34 + 4 * options);
  return frame;
}

/** `chain`: next-header values of extension headers of `units` times 8 bytes. */
function espFrame6(spi: number, chain: readonly (readonly [number, number])[] = []): Uint8Array {
  const frame = new Uint8Array(300);
  frame.set([0x86, 0xdd, 0x60], 12);
  let at = 54;
  let link = 20;
  for (const [header, units] of chain) {
    frame[link] = header;
    link = at;
    frame[at + 1] = units - 1;
    at += 8 * units;
  }
  frame[link] = 50;
  frame.set([0, 0, 0, spi], at);
  return frame;
}

describe('matching flow filter rules', () => {
  it('finds ESP by SPI, with IPv4 options and IPv6 extension headers', () => {
    const rules = [esp4(1, 0x01020304), esp6(2, 77)];
    expect(match(rules, espFrame4(0x01020304))).toBe(1);
    expect(match(rules, espFrame4(0x01020304, 3))).toBe(1);
    expect(match(rules, espFrame4(0x01020305))).toBe(NO_MATCH);
    expect(match(rules, espFrame6(77))).toBe(2);
    expect(
      match(
        rules,
        espFrame6(77, [
          [0, 1],
          [60, 3],
          [43, 2],
        ]),
      ),
    ).toBe(2);
    expect(match(rules, espFrame6(78, [[0, 1]]))).toBe(NO_MATCH);
  });

  it('matches no transport header in a later fragment, and nothing beyond the frame', () => {
    const rules = [esp4(1, 5)];
    const later = espFrame4(5);
    later.set([0x20, 0x10], 20);
    expect(match(rules, later)).toBe(NO_MATCH);
    const first = espFrame4(5);
    first.set([0x20, 0x00], 20);
    expect(match(rules, first)).toBe(1);
    expect(match(rules, espFrame4(5).subarray(0, 42))).toBe(1);
    for (let length = 0; length < 42; length++) expect(match(rules, espFrame4(5).subarray(0, length))).toBe(NO_MATCH);
  });

  it('ends with an IPv6 chain that loops or runs off the end', () => {
    const rules = [esp6(1, 0)];
    const frame = new Uint8Array(70);
    frame.set([0x86, 0xdd, 0x60], 12);
    expect(match(rules, frame)).toBe(NO_MATCH);
    frame[54 + 1] = 255;
    expect(match(rules, frame)).toBe(NO_MATCH);
  });

  it('takes the group of the highest priority, then the rule of the highest priority', () => {
    const low = { ...esp4(1, 5, { priority: 200 }), groupPriority: 1 };
    const high = { ...esp4(2, 5, { priority: 1, classifierId: 2 }), groupPriority: 2 };
    const higher = { ...esp4(3, 5, { priority: 9, classifierId: 3 }), groupPriority: 2 };
    expect(match([low, high, higher], espFrame4(5))).toBe(3);
    expect(match([low, high], espFrame4(5))).toBe(2);
    expect(match([low], espFrame4(5))).toBe(1);
  });

  it('honours partial masks', () => {
    const selectors = [selector(T.eth, [12, 2]), { type: T.ipv4, flags: 1, mask: new Uint8Array(20) }];
    selectors[1].mask.set([255, 255, 240, 0], 12);
    const rules = [
      rule(1, selectors, [
        [12, 8],
        [26, 10],
        [27, 1],
        [28, 0x32],
      ]),
    ];
    const frame = udpFrame(100);
    frame.set([10, 1, 0x3f, 7], 26);
    expect(match(rules, frame)).toBe(1);
    frame[28] = 0x40;
    expect(match(rules, frame)).toBe(NO_MATCH);
  });

  it('finds one of ten thousand SPIs in no more than a few microseconds', () => {
    const rules = Array.from({ length: 10000 }, (_, i) => esp4(i, i + 1000));
    const matcher = new RuleMatcher(rules);
    const frame = espFrame4(5000);
    const start = performance.now();
    for (let i = 0; i < 20000; i++) {
      const spi = 1000 + (i % 10000);
      frame.set([0, 0, spi >>> 8, spi], 34);
      const found = matcher.match(frame, 0, frame.length);
      if (matcher.queues[found] !== i % 10000) throw new Error(`${found} for ${spi}`);
    }
    expect((performance.now() - start) / 20000).toBeLessThan(0.05);
  });

  it('has no longer way past a thousand rules with one key than past one, and finds the first of them', () => {
    const matcher = new RuleMatcher(Array.from({ length: 1024 }, (_, i) => esp4(i, 7)));
    let reads = 0;
    const counting = (frame: Uint8Array) =>
      new Proxy(frame, {
        get: (target, name) => {
          reads++;
          return Reflect.get(target, name, target);
        },
      });
    const looks = Array.from({ length: 64 }, (_, i) => {
      const frame = espFrame4(1000 + i);
      reads = 0;
      expect(matcher.match(counting(frame), 0, frame.length)).toBe(NO_MATCH);
      return reads;
    });
    expect(Math.max(...looks)).toBeLessThan(100);
    const frame = espFrame4(7);
    expect(matcher.match(frame, 0, frame.length)).toBe(0);
  });

  it('agrees with a search through all rules, whatever they are', () => {
    const CLASSIFIERS = [ESP4, ESP6, [selector(T.eth, [12, 2])], [selector(T.eth, [12, 2]), selector(T.ipv4, [9, 1])]];
    const anyRule = fc.record({
      classifier: fc.nat(3),
      groupPriority: fc.nat(1),
      priority: fc.nat(2),
      spi: fc.nat(6),
    });
    fc.assert(
      fc.property(fc.array(anyRule, { maxLength: 60 }), fc.nat(6), fc.boolean(), (picks, spi, six) => {
        const rules = picks.map((pick, id): MatcherRule => {
          const change = { priority: pick.priority, classifierId: pick.classifier };
          const type: readonly (readonly [number, number])[] = [[12, 8]];
          const made = [
            () => esp4(id, pick.spi, change),
            () => esp6(id, pick.spi, change),
            () => rule(id, CLASSIFIERS[2], type, change),
            () => rule(id, CLASSIFIERS[3], [...type, [23, 50 + (pick.spi & 1)]], change),
          ][pick.classifier]();
          return { ...made, groupPriority: pick.groupPriority };
        });
        const frame = six ? espFrame6(spi) : espFrame4(spi);
        const alone = rules.filter((candidate) => match([candidate], frame) !== NO_MATCH);
        const best = Math.max(...alone.map(({ groupPriority, rule: r }) => groupPriority * 1000 + r.priority), -1);
        const found = match(rules, frame);
        if (alone.length === 0) {
          expect(found).toBe(NO_MATCH);
          return;
        }
        const winner = rules[found];
        expect(alone).toContain(winner);
        expect(winner.groupPriority * 1000 + winner.rule.priority).toBe(best);
      }),
      { numRuns: runs(150) },
    );
  });

  it('reads no byte outside of a frame of any content and length', () => {
    const rules = [esp4(1, 0), esp6(2, 0), rule(3, [selector(T.eth, [0, 14])], [], { classifierId: 3 })];
    const matcher = new RuleMatcher([...rules, ...Array.from({ length: 20 }, (_, i) => esp4(10 + i, i + 1))]);
    const frames = fc.uint8Array({ maxLength: 90 }).map((bytes) => {
      if (bytes.length > 20) bytes.set([8, 0, 0x45], 12);
      return bytes;
    });
    fc.assert(
      fc.property(frames, fc.boolean(), (bytes, six) => {
        if (six && bytes.length > 20) bytes.set([0x86, 0xdd, 0x60], 12);
        const around = (fill: number) => {
          const memory = new Uint8Array(bytes.length + 600).fill(fill);
          memory.set(bytes, 300);
          return matcher.match(memory, 300, bytes.length);
        };
        expect(around(0)).toBe(around(50));
      }),
      { numRuns: runs(200) },
    );
  });
});
