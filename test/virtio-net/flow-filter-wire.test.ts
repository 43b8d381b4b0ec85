import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  decodeActionCapability,
  decodeClassifier,
  decodeFlowFilterLimits,
  decodeGroup,
  decodeRule,
  decodeSelectorCapability,
  encodeActionCapability,
  encodeClassifier,
  encodeFlowFilterLimits,
  encodeGroup,
  encodeRule,
  encodeSelectorCapability,
  type FlowSelector,
  keyLengthOf,
  SELECTOR_LENGTH,
  SelectorType,
} from '../../src/virtio-net/flow-filter-wire.ts';

const u8 = fc.integer({ min: 0, max: 0xff });
const u16 = fc.integer({ min: 0, max: 0xffff });
const u32 = fc.integer({ min: 0, max: 0xffffffff });
const selector: fc.Arbitrary<FlowSelector> = fc.integer({ min: 1, max: 20 }).chain((type) =>
  fc.record({
    type: fc.constant(type),
    flags: u8,
    mask:
      type < SELECTOR_LENGTH.length
        ? fc.uint8Array({ minLength: SELECTOR_LENGTH[type], maxLength: SELECTOR_LENGTH[type] })
        : fc.uint8Array({ maxLength: 255 }),
  }),
);

function codeOf(decode: () => unknown): string {
  try {
    decode();
    return 'decoded';
  } catch (error) {
    return error instanceof Error && 'code' in error ? String(error.code) : 'untyped';
  }
}

describe('flow filter structures', () => {
  it('come back as they were encoded', () => {
    const limits = fc.record({
      groups: u32,
      classifiers: u32,
      rules: u32,
      rulesPerGroup: u32,
      lastRulePriority: u8,
      selectorsPerClassifier: u8,
    });
    const rule = fc.record({
      groupId: u32,
      classifierId: u32,
      priority: u8,
      action: u8,
      queueIndex: u16,
      key: fc.uint8Array({ maxLength: 255 }),
    });
    fc.assert(
      fc.property(limits, (x) => {
        expect(decodeFlowFilterLimits(encodeFlowFilterLimits(x))).toEqual(x);
      }),
    );
    fc.assert(
      fc.property(u16, (priority) => {
        expect(decodeGroup(encodeGroup({ priority }))).toEqual({ priority });
      }),
    );
    fc.assert(
      fc.property(rule, (x) => {
        expect(decodeRule(encodeRule(x))).toEqual(x);
      }),
    );
    fc.assert(
      fc.property(fc.array(selector, { maxLength: 6 }), (selectors) => {
        expect(decodeClassifier(encodeClassifier({ selectors }))).toEqual({ selectors });
      }),
    );
    fc.assert(
      fc.property(fc.uniqueArray(selector, { selector: (s) => s.type, maxLength: 6 }), (unordered) => {
        const selectors = unordered.toSorted((a, b) => a.type - b.type);
        expect(decodeSelectorCapability(encodeSelectorCapability(selectors))).toEqual(selectors);
      }),
    );
    fc.assert(
      fc.property(fc.uniqueArray(u8), (unordered) => {
        const actions = unordered.toSorted((a, b) => a - b);
        expect(decodeActionCapability(encodeActionCapability(actions))).toEqual(actions);
      }),
    );
  });

  it('decode from any bytes to a value or a typed error', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 120 }), (bytes) => {
        expect(codeOf(() => decodeFlowFilterLimits(bytes))).toBe('decoded');
        expect(codeOf(() => decodeGroup(bytes))).toBe('decoded');
        expect(['decoded', 'MALFORMED_OBJECT']).toContain(codeOf(() => decodeRule(bytes)));
        expect(['decoded', 'MALFORMED_OBJECT']).toContain(codeOf(() => decodeClassifier(bytes)));
        expect(['decoded', 'MALFORMED_CAPABILITY']).toContain(codeOf(() => decodeSelectorCapability(bytes)));
        expect(['decoded', 'MALFORMED_CAPABILITY']).toContain(codeOf(() => decodeActionCapability(bytes)));
      }),
    );
  });

  it('have the layouts of the standard', () => {
    const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
    const limits = {
      groups: 1,
      classifiers: 2,
      rules: 3,
      rulesPerGroup: 4,
      lastRulePriority: 5,
      selectorsPerClassifier: 6,
    };
    expect(hex(encodeFlowFilterLimits(limits))).toBe('0100000002000000030000000400000005060000');
    expect(hex(encodeGroup({ priority: 0x1234 }))).toBe('3412');
    const key = Uint8Array.of(0xaa, 0xbb);
    const rule = { groupId: 1, classifierId: 2, priority: 3, action: 4, queueIndex: 0x0506, key };
    expect(hex(encodeRule(rule))).toBe('01000000020000000302040006050000aabb');
    const mask = new Uint8Array(8).fill(0xff);
    const selectors = [{ type: SelectorType.esp, flags: 1, mask }];
    expect(hex(encodeClassifier({ selectors }))).toBe('0100000000000000' + '0601000008000000' + 'ffffffffffffffff');
    expect(hex(encodeActionCapability([1, 3]))).toBe('02000000000000000103');
    expect(keyLengthOf(selectors)).toBe(8);
  });

  it.each([
    [
      'a selector that ends after the buffer',
      () => decodeClassifier(encodeClassifierOf(SelectorType.udp).slice(0, -1)),
    ],
    ['a selector count without selectors', () => decodeClassifier(Uint8Array.of(3, 0, 0, 0, 0, 0, 0, 0))],
    [
      'a mask of the wrong length for its type',
      () => decodeClassifier(withLength(encodeClassifierOf(SelectorType.ipv4), 8)),
    ],
    ['a key longer than the rule', () => decodeRule(Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 0, 0, 200))],
  ])('refuse %s', (_what, decode) => {
    expect(decode).toThrow(expect.objectContaining({ code: 'MALFORMED_OBJECT' }));
  });

  it.each([
    ['selector types out of order', () => decodeSelectorCapability(selectorsOf(SelectorType.udp, SelectorType.ipv4))],
    ['a selector type twice', () => decodeSelectorCapability(selectorsOf(SelectorType.udp, SelectorType.udp))],
    ['actions out of order', () => decodeActionCapability(encodeActionCapability([3, 1]))],
    ['more actions than bytes', () => decodeActionCapability(Uint8Array.of(9, 0, 0, 0, 0, 0, 0, 0, 1))],
  ])('refuse a capability with %s', (_what, decode) => {
    expect(decode).toThrow(expect.objectContaining({ code: 'MALFORMED_CAPABILITY' }));
  });

  it('are not written when a value does not fit', () => {
    const rule = { groupId: 1, classifierId: 2, priority: 256, action: 1, queueIndex: 0, key: new Uint8Array(0) };
    expect(() => encodeRule(rule)).toThrow(RangeError);
    expect(() => encodeRule({ ...rule, priority: 1, key: new Uint8Array(256) })).toThrow(RangeError);
    expect(() => encodeGroup({ priority: 65536 })).toThrow(RangeError);
    expect(() => encodeClassifier({ selectors: [{ type: 7, flags: 0, mask: new Uint8Array(256) }] })).toThrow(
      RangeError,
    );
  });
});

function selectorsOf(...types: number[]): Uint8Array {
  return encodeSelectorCapability(
    types.map((type) => ({ type, flags: 0, mask: new Uint8Array(SELECTOR_LENGTH[type]) })),
  );
}

function encodeClassifierOf(type: number): Uint8Array {
  return encodeClassifier({ selectors: [{ type, flags: 0, mask: new Uint8Array(SELECTOR_LENGTH[type]) }] });
}

function withLength(classifier: Uint8Array, length: number): Uint8Array {
  return classifier.with(8 + 4, length);
}
