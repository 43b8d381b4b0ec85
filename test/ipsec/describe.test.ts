import { inspect } from 'node:util';
import { describe, expect, it } from 'vitest';
import { describeSa } from '../../src/ipsec/describe.ts';
import { InboundRules } from '../../src/ipsec/inbound-rules.ts';
import { InlineIpsec } from '../../src/ipsec/inline.ts';
import { IpsecManager } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import { validateSa } from '../../src/ipsec/validate.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import { ipsecDevice } from './fake-device.ts';

const key = 'deadbeefcafef00d0123456789abcdef';
const input = {
  name: 'east',
  direction: 'outbound',
  mode: 'tunnel',
  spi: 0xc0ffee,
  aead: { name: 'aes-gcm', key, salt: '0badcafe' },
  tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
  lifetime: { hardPackets: '18446744073709551615' },
  selector: { source: '10.0.0.0/8', protocol: 17 },
} as const;

/** Everything by which a key could show. */
function shown(value: unknown): string {
  return `${JSON.stringify(value)} ${inspect(value, { depth: 10, showHidden: true })} ${String(value)}`;
}

describe('an SA as plain data', () => {
  it('is what was asked for, without key and salt', () => {
    const described = describeSa(validateSa(input));
    expect(JSON.parse(JSON.stringify(described))).toEqual(described);
    expect(described).toMatchObject({
      name: 'east',
      direction: 'outbound',
      protocol: 'esp',
      spi: '0x00c0ffee',
      aead: { name: 'aes-gcm', keyBits: 128, icvLength: 16 },
      tunnel: { source: '192.0.2.1', destination: '192.0.2.2', ttl: 64 },
      lifetime: { hardPackets: '18446744073709551615', softPackets: '0' },
      selector: { source: '10.0.0.0/8', protocol: 17 },
    });
    expect(shown(described)).not.toMatch(/deadbeef|cafef00d|0badcafe|222, 173|0xde/);
  });

  it('says of one that exists where it runs and what it has carried', async () => {
    const admin = ipsecDevice();
    const ids = [...admin.capabilities.keys()];
    const filter = await FlowFilter.open(admin, ids);
    const inline = await InlineIpsec.open(admin, ids, {
      wire: ipsecWire(),
      rules: filter && new InboundRules(filter),
      table: { resourceId: new Uint32Array(0), handle: new Uint32Array(0) },
      handles: 8,
      maxSas: 8,
      quiesceTransmit: async () => true,
      receiveQueues: 0,
    });
    const guard = new NonceGuard({ memory: new NonceMemory() });
    const manager = new IpsecManager({ inline, inlineObstacle: null, software: null, guard, mtu: 1500, handles: 8 });
    const sa = await manager.addSa(input);
    expect(JSON.parse(JSON.stringify(sa))).toEqual({
      handle: sa.handle,
      name: 'east',
      direction: 'outbound',
      protocol: 'esp',
      mode: 'tunnel',
      spi: '0x00c0ffee',
      placement: { where: 'inline', because: 'the device can express all of it' },
      traffic: { packets: '0', bytes: '0', dropped: {}, softExpired: false },
    });
    expect(inspect(sa)).toContain("spi: '0x00c0ffee'");
    for (const thing of [sa, manager, await sa.query()]) {
      const text = inspect(thing, { depth: 10, showHidden: true });
      expect(text).not.toMatch(/deadbeef|cafef00d|0badcafe|222, 173/);
    }
  });
});
