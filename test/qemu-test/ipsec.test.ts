import { describe, expect, it } from 'vitest';
import {
  applicationAddress,
  type InteropCase,
  isExpressible,
  type MatrixPart,
  matrixPart,
  ourSa,
  spiOf,
} from '../../qemu-test/ipsec/cases.ts';
import { xfrmCommands } from '../../qemu-test/ipsec/xfrm.ts';
import { validateSa } from '../../src/ipsec/validate.ts';

const PARTS: readonly MatrixPart[] = ['aead', 'cipher', 'integrity', 'options'];

describe.each(PARTS)('the %s part of the IPsec matrix', (part) => {
  const cases = matrixPart(part, 'software');

  it('has no two cases of one name', () => {
    expect(new Set(cases.map(({ name }) => name)).size).toBe(cases.length);
  });

  it('is made of SAs that we accept, each with a key and an SPI of its own', () => {
    const keys = new Set<string>();
    for (const [index, item] of cases.entries()) {
      for (const from of ['ours', 'kernel'] as const) {
        const input = ourSa(item, index, from);
        const sa = validateSa(input);
        expect(sa.spi).toBe(spiOf(index, from));
        expect(sa.direction).toBe(from === 'ours' ? 'outbound' : 'inbound');
        keys.add(`${input.aead?.key ?? ''}${input.cipher?.key ?? ''}${input.auth?.key ?? ''}`);
      }
    }
    expect(keys.size).toBe(2 * cases.length);
  });

  it('has two hosts for each case, which no other case has, and finds its states by them', () => {
    const all = cases.flatMap((item, index) =>
      (['ours', 'kernel'] as const).map((end) => applicationAddress(end, index, item.inner)),
    );
    expect(new Set(all).size).toBe(2 * cases.length);
    for (const [index, item] of cases.entries()) {
      const [ours, kernel] = (['ours', 'kernel'] as const).map((end) => applicationAddress(end, index, item.inner));
      const commands = xfrmCommands(item, index);
      const bits = item.inner === 4 ? 32 : 128;
      for (const [direction, from, to] of [
        ['in', ours, kernel],
        ['out', kernel, ours],
      ]) {
        const policy = commands.find((line) =>
          line.includes(`dir ${direction} src ${from}/${bits} dst ${to}/${bits} `),
        );
        expect(policy).toContain(`reqid ${index + 1} mode ${item.mode}`);
      }
      expect(
        commands.filter((line) => line.includes('state add') && line.includes(` reqid ${index + 1} `)).length,
      ).toBe(2);
    }
  });

  it('gives the kernel the same keys, SPIs, windows and modes', () => {
    for (const [index, item] of cases.entries()) {
      const commands = xfrmCommands(item, index);
      for (const from of ['ours', 'kernel'] as const) {
        const { aead, cipher, auth } = ourSa(item, index, from);
        const state = commands.find(
          (line) => line.includes(`state add`) && line.includes(`spi ${spiOf(index, from)} `),
        );
        expect(state).toContain(`mode ${item.mode} replay-window ${item.replayWindow}`);
        expect(state?.includes('flag esn')).toBe(item.esn);
        expect(state?.includes('encap espinudp')).toBe(item.natTraversal);
        for (const field of [aead, cipher, auth])
          if (field?.key !== undefined) expect(state).toContain(`0x${field.key}`);
      }
    }
  });
});

describe('the IPsec matrix', () => {
  it('asks Linux for the AH alignment of RFC 4302 over IPv4 only', () => {
    const ah = matrixPart('integrity', 'software').filter(({ algorithms }) => algorithms.protocol === 'ah');
    for (const item of ah) expect(xfrmCommands(item, 0).join('\n').includes('align4')).toBe(item.outer === 4);
  });

  it('lets the encapsulating packets of NAT traversal in transport mode through, before it asks for protection', () => {
    const item = matrixPart('options', 'software').find(
      ({ mode, natTraversal }) => mode === 'transport' && natTraversal,
    );
    if (item === undefined) throw new Error('no such case');
    expect(xfrmCommands(item, 0).at(-1)).toMatch(/dir in .* proto 17 sport 4500 dport 4500 priority 1$/);
  });

  it('knows what an SA object cannot say: short ICVs and long keys', () => {
    const beyond = PARTS.flatMap((part) => matrixPart(part, 'software')).filter((item) => !isExpressible(item));
    expect(beyond.length).toBeGreaterThan(0);
    for (const { name } of beyond) expect(name).toMatch(/gcm-(8|12)|sha384|sha512/);
  });

  const all = (['software', 'inline'] as const).map(
    (where) => [where, PARTS.flatMap((part) => matrixPart(part, where))] as const,
  );
  const transform = ({ algorithms: { protocol, aead, cipher, auth } }: InteropCase) =>
    [protocol, aead?.name, aead?.key.length, aead?.icvLength, cipher?.name, cipher?.key?.length, auth?.name].join(' ');
  const kind = ({ algorithms: { protocol, aead } }: InteropCase) => `${protocol} ${aead === undefined ? '' : 'aead'}`;
  const families = ({ mode, outer, inner }: InteropCase) => `${mode} ${inner}in${outer}`;
  const FAMILIES = ['transport 4in4', 'transport 6in6', 'tunnel 4in4', 'tunnel 4in6', 'tunnel 6in4', 'tunnel 6in6'];

  it.each(all)('takes each transform through both modes and both outer families, %s', (where, cases) => {
    for (const group of groups(cases, transform)) {
      if (where === 'inline' && !group.every(isExpressible)) continue;
      expect(new Set(group.map(({ mode }) => mode)), group[0].name).toEqual(new Set(['tunnel', 'transport']));
      expect(new Set(group.map(({ outer }) => outer)), group[0].name).toEqual(new Set([4, 6]));
    }
  });

  it.each(all)('takes each kind of transform through every combination of families, %s', (_, cases) => {
    const kinds = groups(cases, kind);
    expect(kinds.length).toBe(3);
    for (const group of kinds) expect([...new Set(group.map(families))].sort(), group[0].name).toEqual(FAMILIES);
  });

  it.each(all)('has every two of mode, ESN and window, and NAT traversal in both modes, %s', (_, cases) => {
    for (const group of groups(cases, kind)) {
      const windows = group.filter(({ replayWindow }) => replayWindow !== 64);
      const pairs = windows.flatMap(({ mode, esn, replayWindow }) => [
        `${mode} esn ${esn}`,
        `${mode} ${replayWindow}`,
        `esn ${esn} ${replayWindow}`,
      ]);
      expect(new Set(pairs).size, group[0].name).toBe(12);
      const natTraversal = new Set(group.filter((item) => item.natTraversal).map(({ mode }) => mode));
      expect(natTraversal.size, group[0].name).toBe(group[0].algorithms.protocol === 'esp' ? 2 : 0);
    }
  });
});

function groups(cases: readonly InteropCase[], by: (item: InteropCase) => string): InteropCase[][] {
  return [...new Set(cases.map(by))].map((value) => cases.filter((item) => by(item) === value));
}
