/** Packets that are sent, and their `struct virtio_net_hdr` (Virtio 1.4, 5.1.9.2.2, 5.1.4.1). */
import { Ethernet, Udp } from '../../packet/fields.ts';
import { ResourceType as R } from '../../virtio/admin-wire.ts';
import { Feature } from '../../virtio/features.ts';
import { NetConfigField } from '../../virtio-net/config.ts';
import { NetHeaderFlag as Flag, GsoType, type NetHeader } from '../../virtio-net/header.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, need } from '../check.ts';
import { isEqual, protocolOf, udpFrame } from '../frames.ts';
import type { Network } from '../network.ts';
import { offeredCapabilities, succeeded } from '../offer.ts';
import { anySa, saBytes } from '../samples.ts';

import { Raw, TUNNEL_BITS, UDP, unusedFields } from './header-fields.ts';

const SENT = '5.1.9.2.2';
const NET = '5.1.4.1';

const UNKNOWN_FLAG = 0x80;
/** More than any frame here is long. */
const BEYOND = 0x7000;
const HOST_TSO = [Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_USO, Feature.HOST_UFO];

/** A packet with header fields that are to be ignored leaves as any other. */
async function expectSent(
  network: Network,
  what: string,
  header: Partial<NetHeader>,
  raw: readonly (readonly [number, number])[] = [],
  frame = udpFrame(network.outward),
): Promise<void> {
  await network.send(frame, header, { raw });
  const came = await network.departure(`a packet with ${what}`);
  expect(isEqual(came, frame), `a packet with ${what} was sent with other bytes`);
}

/** A packet that the device must not accept does not leave, one after it does. */
async function expectRefused(bench: Bench, what: string, header: Partial<NetHeader>): Promise<void> {
  const { network } = await bench.network();
  const refused = udpFrame(network.outward);
  await network.send(refused, header);
  const next = udpFrame(network.outward);
  await network.send(next);
  for (;;) {
    const came = await network.departure('the packet after it');
    expect(!isEqual(came, refused), `a packet with ${what} was sent`);
    if (isEqual(came, next)) break;
  }
  bench.log(`a packet with ${what} was not sent, the next one was`);
}

export const sentChecks: readonly Check[] = [
  must(
    'HDR-001',
    SENT,
    'Flags that the device does not know are ignored',
    ['tx-unknown-flag-dropped'],
    async (bench) => {
      const { network, driver } = await bench.network();
      await expectSent(network, `flag ${hex(UNKNOWN_FLAG)}`, {}, [[0, UNKNOWN_FLAG]]);
      bench.log(`sent with flag ${hex(UNKNOWN_FLAG)}, header of ${driver.layout.length} bytes`);
    },
  ),
  must(
    'HDR-002',
    SENT,
    'Without NEEDS_CSUM, csum_start and csum_offset are not used',
    ['tx-csum-always'],
    async (bench) => {
      const { network } = await bench.network();
      const frame = udpFrame({ ...network.outward, checksum: 'wrong' });
      await expectSent(network, 'csum_start and csum_offset', { csumStart: UDP, csumOffset: Udp.checksum }, [], frame);
      bench.log('sent as it was');
    },
  ),
  must('HDR-003', SENT, 'Without OUT_NET_HEADER, outer_nh_offset is not used', ['tx-outer-nh-used'], async (bench) => {
    const { network } = await unusedFields(bench);
    await expectSent(network, `outer_nh_offset ${BEYOND}`, {}, [[Raw.outerNh, BEYOND]]);
    bench.log('sent as it was');
  }),
  must('HDR-004', SENT, 'With segmentation, hdr_len is not relied on', ['tx-hdr-len-trusted'], async (bench) => {
    const tso = HOST_TSO.filter((bit) => bench.offered().has(bit)).slice(0, 1);
    need(tso.length > 0, 'the device offers no segmentation');
    const { network } = await bench.network({ features: [Feature.CSUM, ...tso] });
    await expectSent(network, `hdr_len ${BEYOND}`, { hdrLen: BEYOND });
    await expectSent(network, 'hdr_len 1', { hdrLen: 1 });
    bench.log('sent with a hdr_len beyond the packet, and with one inside its first header');
  }),
  must('HDR-005', SENT, 'A packet with both UDP tunnel bits in gso_type is not accepted', ['tx-gso-ignored'], (bench) =>
    expectRefused(bench, 'both UDP tunnel bits', {
      flags: Flag.NEEDS_CSUM,
      gsoType: TUNNEL_BITS | GsoType.TCPV4,
      gsoSize: 64,
      csumStart: UDP,
      csumOffset: Udp.checksum,
    }),
  ),
  must(
    'HDR-006',
    SENT,
    'Without UDP tunnel bits, outer_th_offset and inner_nh_offset are not used',
    ['tx-tunnel-offsets-used'],
    async (bench) => {
      const { network } = await unusedFields(bench);
      await expectSent(network, 'tunnel offsets', {}, [
        [Raw.outerTh, BEYOND],
        [Raw.innerNh, BEYOND],
      ]);
      bench.log('sent as it was');
    },
  ),
  must(
    'HDR-007',
    SENT,
    'A packet with a UDP tunnel bit and without NEEDS_CSUM is not accepted',
    ['tx-gso-ignored'],
    (bench) =>
      expectRefused(bench, 'a UDP tunnel bit and without NEEDS_CSUM', {
        gsoType: GsoType.UDP_TUNNEL_IPV4 | GsoType.TCPV4,
        gsoSize: 64,
      }),
  ),
  must('HDR-008', SENT, 'A packet with a UDP tunnel bit and DATA_VALID is not accepted', ['tx-gso-ignored'], (bench) =>
    expectRefused(bench, 'a UDP tunnel bit and DATA_VALID', {
      flags: Flag.NEEDS_CSUM | Flag.DATA_VALID,
      gsoType: GsoType.UDP_TUNNEL_IPV4 | GsoType.TCPV4,
      gsoSize: 64,
      csumStart: UDP,
      csumOffset: Udp.checksum,
    }),
  ),
  must(
    'HDR-009',
    SENT,
    'A packet with a UDP tunnel bit and no inner type is not accepted',
    ['tx-gso-ignored'],
    (bench) =>
      expectRefused(bench, 'a UDP tunnel bit and inner type NONE', {
        flags: Flag.NEEDS_CSUM,
        gsoType: GsoType.UDP_TUNNEL_IPV4,
        gsoSize: 64,
        csumStart: UDP,
        csumOffset: Udp.checksum,
      }),
  ),
  must(
    'HDR-010',
    SENT,
    'A packet with UDP_TUNNEL_CSUM and without UDP tunnel bits is not accepted',
    ['tx-gso-ignored'],
    async (bench) => {
      need(bench.profile.revision === 'virtio-1.4', 'the draft has another meaning for this flag');
      await expectRefused(bench, 'UDP_TUNNEL_CSUM and no tunnel', { flags: Flag.UDP_TUNNEL_CSUM });
    },
  ),
  must(
    'HDR-011',
    SENT,
    'Without NEEDS_CSUM, the device does not rely on the checksum of a packet',
    ['tx-bad-checksum-dropped'],
    async (bench) => {
      const { network } = await bench.network();
      const frame = udpFrame({ ...network.outward, checksum: 'wrong' });
      await expectSent(network, 'a wrong checksum', {}, [], frame);
      bench.log('a packet with a wrong checksum was sent as it was');
    },
  ),
  must(
    'HDR-012',
    SENT,
    'Without SECURITY, resource_id and resource_type are not used',
    ['tx-resource-used'],
    async (bench) => {
      const { driver, network } = await bench.network({ ipsec: true });
      const admin = bench.console(driver);
      const sa = anySa(await offeredCapabilities(admin), 'outbound');
      succeeded(await admin.create(R.NET_IPSEC_OUTB_SA, 0, saBytes(admin.revision, sa, 0)));
      await expectSent(network, 'a resource and no SECURITY', { resourceId: 0, resourceType: R.NET_IPSEC_OUTB_SA });
      await expectSent(network, 'an unknown resource and no SECURITY', { resourceId: 0xfffff, resourceType: 0x999 });
      bench.log('sent in the clear');
    },
  ),
  must(
    'HDR-039',
    NET,
    'With MTU, packets of up to mtu bytes are sent without fragmentation',
    ['tx-long-dropped'],
    async (bench) => {
      bench.needFeatures(Feature.MTU);
      const mtu = bench.target.structures.device.read16(NetConfigField.mtu);
      const { network } = await bench.network({ features: [Feature.MTU] });
      const frame = udpFrame({ ...network.outward, length: Math.min(Ethernet.length + mtu, 3900) });
      await network.send(frame);
      const came = await network.departure(`a packet of ${frame.length - Ethernet.length} bytes`);
      expect(isEqual(came, frame) && protocolOf(came) >= 0, 'the packet was sent with other bytes');
      bench.log(`a packet of ${frame.length - Ethernet.length} bytes was sent, mtu ${mtu}`);
    },
  ),
];
