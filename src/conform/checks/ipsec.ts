/** SA objects (Virtio 1.4, 5.1.9.7.4), with the statements on SAs of the crypto device (5.9.9.9). */

import type { SaObject } from '../../ipsec/wire/codec.ts';
import { ipsecWire } from '../../ipsec/wire/revisions.ts';
import { AdminStatus, CapabilityId, ResourceType as R } from '../../virtio/admin-wire.ts';
import { Feature } from '../../virtio/features.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, need, should } from '../check.ts';
import { type AdminConsole, outcome } from '../console.ts';
import { type Limits, type Offer, offeredCapabilities, succeeded, useCommands } from '../offer.ts';
import { anySa, freshKey, saBytes, saType } from '../samples.ts';
import { needAlgorithms, outboundSa, sendSecured, withSecured } from '../secured.ts';
import { expectDisabled, withoutCapability } from './flow-filter.ts';

const SECTION = '5.1.9.7.4';
const CAPABILITIES = [CapabilityId.NET_IPSEC_RESOURCE, CapabilityId.NET_IPSEC_SA];
const DIRECTIONS = ['outbound', 'inbound'] as const;
type Direction = (typeof DIRECTIONS)[number];
/** Numbers that the tables reserve, or that no device offers for IPsec. */
const Reserved = { mode: 9, cipher: 62n, auth: 63n } as const;

async function start(bench: Bench, limits: Limits = {}): Promise<{ admin: AdminConsole; offer: Offer }> {
  const admin = bench.console(await bench.up({ ipsec: limits }));
  const offer = await offeredCapabilities(admin);
  need(offer.sas !== null && offer.modes.length > 0, 'the device has no IPsec capabilities');
  return { admin, offer };
}

/** CREATE of an SA with something that the device does not support must fail; of the same without it, succeed. */
async function expectRefused(
  bench: Bench,
  direction: Direction,
  what: string,
  change: (object: SaObject) => Partial<SaObject> | null,
): Promise<void> {
  const { admin, offer } = await start(bench);
  const type = saType(direction);
  const sa = anySa(offer, direction);
  const good = saBytes(admin.revision, sa, 0);
  const wire = ipsecWire(admin.revision);
  const object = wire.decodeSa(good);
  const wrong = change(object);
  need(wrong !== null, `there is no ${what} that the device does not support`);
  const bytes = new Uint8Array(wire.saObjectSize);
  wire.encodeSa({ ...object, ...wrong }, bytes);
  const reply = await admin.create(type, 0, bytes);
  expect(reply.status !== AdminStatus.OK, `${reply.name} succeeded with an unsupported ${what}`);
  succeeded(await admin.create(type, 0, good));
}

function refusals(direction: Direction, first: number): Check[] {
  const name = direction === 'outbound' ? 'OUTB_SA' : 'INB_SA';
  const limit = direction === 'outbound' ? 'outb_sa_limit' : 'inb_sa_limit';
  const id = (offset: number): Check['id'] => `IPS-${String(first + offset).padStart(3, '0')}`;
  const faults = ['obj-invalid-accepted'];
  return [
    must(id(0), SECTION, `CREATE of ${name} fails with an id that is not below ${limit}`, faults, async (bench) => {
      const { admin, offer } = await start(bench, { sas: { inbound: 4, outbound: 4 } });
      const most = Math.min(4, (direction === 'outbound' ? offer.sas?.outbound : offer.sas?.inbound) ?? 0);
      const type = saType(direction);
      const reply = await admin.create(type, most, saBytes(admin.revision, anySa(offer, direction), most));
      expect(reply.status !== AdminStatus.OK, `${reply.name} succeeded, ${limit} is ${most}`);
      succeeded(await admin.create(type, most - 1, saBytes(admin.revision, anySa(offer, direction), most - 1)));
    }),
    must(id(1), SECTION, `CREATE of ${name} fails with a mode that is not supported`, faults, (bench) =>
      expectRefused(bench, direction, 'mode', () => ({ mode: Reserved.mode })),
    ),
    must(id(2), SECTION, `CREATE of ${name} fails with options that are not supported`, faults, (bench) =>
      expectRefused(bench, direction, 'option', ({ options }) => ({ options: options | (1n << 20n) })),
    ),
    must(id(3), SECTION, `CREATE of ${name} fails with a cipher that is not supported`, faults, (bench) =>
      expectRefused(bench, direction, 'cipher', () => ({
        cipherAlgorithm: Reserved.cipher,
        cipherKey: freshKey(16),
      })),
    ),
    must(
      id(4),
      SECTION,
      `CREATE of ${name} fails with an authentication algorithm that is not supported`,
      faults,
      (bench) =>
        expectRefused(bench, direction, 'authentication algorithm', () => ({
          authAlgorithm: Reserved.auth,
          authKey: freshKey(20),
        })),
    ),
  ];
}

export const ipsecChecks: readonly Check[] = [
  must(
    'IPS-001',
    SECTION,
    'IPSEC_RESOURCE and IPSEC_SA are among the capabilities',
    ['cap-list-short'],
    async (bench) => {
      const admin = bench.console(await bench.bringUp(bench.target, { features: [Feature.ADMIN_VQ, Feature.IPSEC] }));
      await useCommands(admin);
      const { ids } = await offeredCapabilities(admin);
      const missing = CAPABILITIES.filter((id) => !ids.includes(id));
      expect(missing.length === 0, `missing: ${missing.map((id) => hex(id)).join(', ')}`);
    },
  ),
  must(
    'IPS-002',
    SECTION,
    'SAs can be created, modified, queried and destroyed',
    ['obj-modify-refused'],
    async (bench) => {
      const { admin, offer } = await start(bench);
      for (const direction of DIRECTIONS) {
        const type = saType(direction);
        succeeded(await admin.create(type, 0, saBytes(admin.revision, anySa(offer, direction), 0)));
        // With another key and salt, so that no nonce can repeat.
        succeeded(await admin.modify(type, 0, saBytes(admin.revision, anySa(offer, direction), 0)));
        succeeded(await admin.query(type, 0));
        succeeded(await admin.destroy(type, 0));
      }
    },
  ),
  ...CAPABILITIES.map((capability, i) =>
    must(
      `IPS-00${3 + i}`,
      SECTION,
      `While ${['IPSEC_RESOURCE', 'IPSEC_SA'][i]} is disabled, commands on SAs fail with INVALID_OPCODE`,
      ['obj-disabled-as-enomem'],
      async (bench) => {
        const { admin } = await withoutCapability(bench, capability);
        await expectDisabled(admin, [R.NET_IPSEC_OUTB_SA, R.NET_IPSEC_INB_SA]);
      },
    ),
  ),
  must('IPS-005', SECTION, 'CREATE of an SA that exists fails with EEXIST', ['obj-exists-as-einval'], async (bench) => {
    const { admin, offer } = await start(bench);
    for (const direction of DIRECTIONS) {
      const type = saType(direction);
      succeeded(await admin.create(type, 0, saBytes(admin.revision, anySa(offer, direction), 0)));
      const reply = await admin.create(type, 0, saBytes(admin.revision, anySa(offer, direction, 0x7001), 0));
      expect(reply.status === AdminStatus.EEXIST, () => `${reply.name}: expected EEXIST, came ${outcome(reply)}`);
    }
  }),
  ...refusals('outbound', 6),
  ...refusals('inbound', 11),
  should(
    'IPS-016',
    SECTION,
    'The SA of an outbound packet is found by the id that the packet names',
    ['tx-first-sa'],
    async (bench) => {
      await withSecured(bench, async (secured) => {
        const [{ algorithms }] = needAlgorithms(secured.offer, 'esp', 'tunnel');
        const [{ algorithms: other }] = needAlgorithms(secured.offer, 'esp', 'tunnel');
        await outboundSa(secured, 0, { spi: 0x3000 }, algorithms);
        await outboundSa(secured, 5, { spi: 0x3005 }, other);
        for (const [id, spi] of [
          [0, 0x3000],
          [5, 0x3005],
        ]) {
          const { wire } = await sendSecured(secured, id);
          const came = spiOf(wire);
          bench.log(`a packet for SA ${id} left with SPI ${hex(came)}`);
          expect(came === spi, `a packet for SA ${id} left with SPI ${hex(came)}, not ${hex(spi)}`);
        }
      });
    },
  ),
  must(
    'IPS-017',
    SECTION,
    'An SA that was destroyed can be created again without a reset',
    ['obj-id-once'],
    async (bench) => {
      const { admin, offer } = await start(bench);
      for (const direction of DIRECTIONS) {
        for (let time = 0; time < 3; time++) {
          const type = saType(direction);
          succeeded(await admin.create(type, 0, saBytes(admin.revision, anySa(offer, direction), 0)));
          succeeded(await admin.destroy(type, 0));
        }
      }
    },
  ),
];

/** The SPI of an ESP packet over IPv4 in an Ethernet frame. */
function spiOf(frame: Uint8Array): number {
  const esp = 14 + (frame[14] & 0xf) * 4;
  return ((frame[esp] << 24) | (frame[esp + 1] << 16) | (frame[esp + 2] << 8) | frame[esp + 3]) >>> 0;
}
