import { describe, expect, it } from 'vitest';
import {
  concat,
  counting,
  espTransforms,
  ethernet,
  ipv4,
  ipv6,
  makeBench,
  makePair,
  protectOne,
  toHex,
  unprotectOne,
  V4,
  V6,
} from './support.ts';

const families = {
  'IPv4 in IPv4': { tunnel: V4, packet: ipv4 },
  'IPv6 in IPv4': { tunnel: V4, packet: ipv6 },
  'IPv4 in IPv6': { tunnel: V6, packet: ipv4 },
  'IPv6 in IPv6': { tunnel: V6, packet: ipv6 },
} as const;

describe('ESP round trip', () => {
  for (const [id, algorithms] of espTransforms()) {
    for (const esn of [false, true]) {
      it(`${id} with ${esn ? '64' : '32'}-bit sequence numbers opens what it has closed, in every mode and family`, () => {
        const bench = makeBench();
        let handle = 1;
        const initial = { sequence: esn ? 0x1_0000_0005n : 5n };
        for (const { tunnel, packet } of Object.values(families)) {
          for (const mode of ['tunnel', 'transport'] as const) {
            const changes = {
              ...algorithms,
              mode,
              spi: 0x1000 + handle,
              options: { esn },
              initial,
              ...(mode === 'tunnel' ? { tunnel } : {}),
            };
            const [out, inbound] = makePair(changes, { initial: { sequence: initial.sequence - 1n } });
            bench.ipsec.add(handle, out);
            bench.ipsec.add(handle + 1, inbound);
            for (const size of [0, 1, 2, 3, 15, 16, 17, 100, 1400]) {
              const input = ethernet(packet(counting(size)));
              const closed = protectOne(bench, input, handle, 14);
              expect(closed.verdict).toBe('ok');
              expect(toHex(closed.bytes)).not.toContain(toHex(input));
              const opened = unprotectOne(bench, closed.bytes, 14);
              expect(opened.verdict).toBe('ok');
              expect(opened.sa).toBe(handle + 1);
              expect(toHex(opened.bytes)).toBe(toHex(input));
            }
            handle += 2;
          }
        }
        bench.ipsec.close();
        expect(bench.engine.contexts).toBe(0);
      });
    }
  }
});
