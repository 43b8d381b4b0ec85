import { describe, expect, it } from 'vitest';
import { isExpressible, type MatrixPart, matrixPart, ourSa, spiOf } from '../../qemu-test/ipsec/cases.ts';
import { xfrmCommands } from '../../qemu-test/ipsec/xfrm.ts';
import { validateSa } from '../../src/ipsec/validate.ts';

const PARTS: readonly MatrixPart[] = ['aead', 'cipher', 'integrity', 'options'];

describe.each(PARTS)('the %s part of the IPsec matrix', (part) => {
  const cases = matrixPart(part);

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
    const ah = matrixPart('integrity').filter(({ algorithms }) => algorithms.protocol === 'ah');
    for (const item of ah) expect(xfrmCommands(item, 0).join('\n').includes('align4')).toBe(item.outer === 4);
  });

  it('lets the encapsulating packets of NAT traversal in transport mode through, before it asks for protection', () => {
    const item = matrixPart('options').find(({ mode, natTraversal }) => mode === 'transport' && natTraversal);
    if (item === undefined) throw new Error('no such case');
    expect(xfrmCommands(item, 0).at(-1)).toMatch(/dir in .* proto 17 sport 4500 dport 4500 priority 1$/);
  });

  it('knows what an SA object cannot say: short ICVs and long keys', () => {
    const beyond = PARTS.flatMap(matrixPart).filter((item) => !isExpressible(item));
    expect(beyond.length).toBeGreaterThan(0);
    for (const { name } of beyond) expect(name).toMatch(/gcm-(8|12)|sha384|sha512/);
  });
});
