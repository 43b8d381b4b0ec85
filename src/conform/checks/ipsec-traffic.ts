/** Packets through SAs (Virtio 1.4, 5.1.9.7, 5.1.9.4.1, 5.9.9.9.1.2 and 5.9.9.9.2; RFC 4301 to 4303, 3948). */
import { SaOption } from '../../ipsec/wire/numbers.ts';
import { Esp, Ethernet, IpProtocol, Ipv4, Udp } from '../../packet/fields.ts';
import { ResourceType as R } from '../../virtio/admin-wire.ts';
import { FlowFilterAction as Action, encodeGroup } from '../../virtio-net/flow-filter-wire.ts';
import { NetHeaderFlag as Flag } from '../../virtio-net/header.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, hex, must, need } from '../check.ts';
import { type FrameOptions, get16, isEqual, udpFrame } from '../frames.ts';
import { succeeded } from '../offer.ts';
import { classification, classifierBytes, modeOf, portMatch, ruleBytes, type SaWish } from '../samples.ts';
import {
  arrive,
  expectOpens,
  inboundSa,
  ipsecRule,
  type Mode,
  needAlgorithms,
  outboundSa,
  type Protocol,
  protocolMatch,
  type Secured,
  sendSecured,
  withSecured,
} from '../secured.ts';

const OPERATION = '5.1.9.7';
const RECEIVED = '5.1.9.4.1';
const OPTIONS = '5.9.9.9.1.2';
const OBJECT = '5.9.9.9.2';
const SPI = 0x4001;
const NAT_T = { sourcePort: 4500, destinationPort: 4500 } as const;
const SECURITY = Flag.SECURITY | Flag.SECURITY_ERR;
const INNER_PORT = 4002;

/** Every algorithm that a mode offers, out of the device and into the judge. */
function outbound(id: Check['id'], protocol: Protocol, mode: Mode, faults: readonly string[]): Check {
  const name = `${protocol.toUpperCase()} in ${mode} mode`;
  return must(
    id,
    OPERATION,
    `Outbound packets leave as ${name}, with each algorithm that is offered`,
    faults,
    (bench) =>
      withSecured(bench, async (secured) => {
        for (const [i, each] of needAlgorithms(secured.offer, protocol, mode).entries()) {
          await outboundSa(secured, i, { protocol, mode, spi: SPI + i }, each.algorithms);
          for (const length of [128, 129, 1000]) {
            const { plain, wire } = await sendSecured(secured, i, { length });
            expectOpens(secured, wire, plain, protocol, each.name);
          }
          bench.log(`${each.name}: three packets verified`);
        }
      }),
  );
}

/** Every algorithm that a mode offers, from the judge into the device. */
function inbound(id: Check['id'], protocol: Protocol, mode: Mode, faults: readonly string[]): Check {
  const name = `${protocol.toUpperCase()} in ${mode} mode`;
  return must(
    id,
    OPERATION,
    `Inbound packets of ${name} arrive in the clear, with each algorithm that is offered`,
    faults,
    (bench) =>
      withSecured(bench, async (secured) => {
        const { judge, network } = secured;
        await ipsecRule(secured, protocolMatch(protocol));
        for (const [i, each] of needAlgorithms(secured.offer, protocol, mode).entries()) {
          const handle = await inboundSa(
            secured,
            i,
            { protocol, mode, spi: SPI + i, replayWindow: 64 },
            each.algorithms,
          );
          for (const length of [128, 129, 1000]) {
            const plain = udpFrame({ ...network.inward, length });
            const { frame, header } = await arrive(secured, judge.protect(plain, handle), `a packet of ${each.name}`);
            expect(isEqual(frame, plain), `${each.name}: the packet arrived with other bytes`);
            expect((header.flags & SECURITY) === Flag.SECURITY, `${each.name}: flags is ${hex(header.flags)}`);
          }
          bench.log(`${each.name}: three packets arrived in the clear`);
        }
      }),
  );
}

/** A device with one inbound ESP tunnel SA, object 0, and a rule for ESP. */
async function withInbound(
  bench: Bench,
  wish: Partial<SaWish>,
  work: (secured: Secured, handle: number) => Promise<void>,
): Promise<void> {
  await withSecured(bench, async (secured) => {
    const [{ algorithms }] = needAlgorithms(secured.offer, 'esp', 'tunnel');
    await ipsecRule(secured, protocolMatch('esp'));
    const handle = await inboundSa(secured, 0, { spi: SPI, replayWindow: 64, ...wish }, algorithms);
    await work(secured, handle);
  });
}

function needOption(secured: Secured, protocol: Protocol, mode: Mode, bit: number): void {
  const entry = secured.offer.modes.find((one) => one.mode === modeOf(protocol, mode));
  need(entry !== undefined && (entry.options & bit) !== 0, 'the device does not offer the option');
}

const OUTER = Ethernet.length;

/** An option of outbound ESP tunnel SAs: what `check` says about inner packet and outer header must hold. */
function option(
  id: Check['id'],
  name: string,
  bit: number,
  wish: Partial<SaWish>,
  frame: Partial<FrameOptions>,
  look: (wire: Uint8Array, secured: Secured, plain: Uint8Array) => string | null,
): Check {
  return must(id, OPTIONS, `Option ${name}`, ['ipsec-options-ignored'], (bench) =>
    withSecured(bench, async (secured) => {
      needOption(secured, 'esp', 'tunnel', bit);
      const [{ algorithms }] = needAlgorithms(secured.offer, 'esp', 'tunnel');
      await outboundSa(secured, 0, { spi: SPI, ...wish }, algorithms);
      const { plain, wire } = await sendSecured(secured, 0, frame);
      const wrong = look(wire, secured, plain);
      bench.log(`outer header ${Buffer.from(wire.subarray(OUTER, OUTER + Ipv4.minLength)).toString('hex')}`);
      expect(wrong === null, wrong ?? '');
    }),
  );
}

/** What the other end finds in a packet. */
function inner(secured: Secured, wire: Uint8Array): Uint8Array | null {
  return secured.judge.open(wire).frame;
}

export const ipsecTrafficChecks: readonly Check[] = [
  outbound('IPS-018', 'esp', 'tunnel', ['ipsec-icv-broken', 'tx-security-ignored']),
  outbound('IPS-019', 'esp', 'transport', ['ipsec-icv-broken', 'tx-security-ignored']),
  outbound('IPS-020', 'ah', 'tunnel', ['ipsec-icv-broken', 'tx-security-ignored']),
  outbound('IPS-021', 'ah', 'transport', ['ipsec-icv-broken', 'tx-security-ignored']),
  inbound('IPS-022', 'esp', 'tunnel', ['flow-ipsec-ignored']),
  inbound('IPS-023', 'esp', 'transport', ['flow-ipsec-ignored']),
  inbound('IPS-024', 'ah', 'tunnel', ['flow-ipsec-ignored']),
  inbound('IPS-025', 'ah', 'transport', ['flow-ipsec-ignored']),
  must(
    'IPS-026',
    RECEIVED,
    'SECURITY is set in a packet that went through IPsec, with the SA that it came by',
    ['rx-security-missing', 'rx-bad-resource'],
    (bench) =>
      withInbound(bench, {}, async (secured, handle) => {
        const { header } = await arrive(
          secured,
          secured.judge.protect(udpFrame(secured.network.inward), handle),
          'the packet',
        );
        bench.log(
          `flags ${hex(header.flags)}, resource_id ${header.resourceId}, resource_type ${hex(header.resourceType)}`,
        );
        expect((header.flags & Flag.SECURITY) !== 0, `flags is ${hex(header.flags)}`);
        expect(header.resourceId === 0, `resource_id is ${header.resourceId}, the SA has id and obj_id 0`);
      }),
  ),
  must(
    'IPS-027',
    RECEIVED,
    'SECURITY_ERR is clear in a packet that IPsec found no error in',
    ['rx-error-lie'],
    (bench) =>
      withInbound(bench, {}, async (secured, handle) => {
        const { header } = await arrive(
          secured,
          secured.judge.protect(udpFrame(secured.network.inward), handle),
          'the packet',
        );
        bench.log(`flags ${hex(header.flags)}`);
        expect((header.flags & Flag.SECURITY_ERR) === 0, `flags is ${hex(header.flags)}`);
      }),
  ),
  must(
    'IPS-028',
    RECEIVED,
    'SECURITY_ERR is set in a packet that IPsec found an error in, if it is passed at all',
    ['rx-error-missing'],
    (bench) =>
      withInbound(bench, {}, async (secured, handle) => {
        const { judge, network } = secured;
        const good = judge.protect(udpFrame(network.inward), handle);
        const unknown = good.slice();
        unknown[OUTER + Ipv4.minLength + Esp.spi] ^= 0x40;
        const broken = good.slice();
        broken[broken.length - 1] ^= 1;
        for (const [what, wire] of [
          ['an unknown SPI', unknown],
          ['a wrong ICV', broken],
        ] as const) {
          await network.inject(wire);
          const received = await network.arrivedAfterAll();
          const flags = received?.header.flags ?? 0;
          bench.log(`a packet with ${what} ${received === null ? 'was dropped' : `came with flags ${hex(flags)}`}`);
          expect(
            received === null || (flags & SECURITY) === SECURITY,
            `a packet with ${what} came with flags ${hex(flags)}`,
          );
        }
      }),
  ),
  must(
    'IPS-029',
    RECEIVED,
    'SECURITY_SA_SOFT_EXPIRY_WARN is set when the SA has reached a soft limit',
    ['rx-soft-missing', 'ipsec-limits-ignored'],
    (bench) =>
      withSecured(bench, async (secured) => {
        const { judge, network } = secured;
        needOption(secured, 'esp', 'tunnel', SaOption.lifetime);
        const [{ algorithms }] = needAlgorithms(secured.offer, 'esp', 'tunnel');
        await ipsecRule(secured, protocolMatch('esp'));
        const handle = await inboundSa(
          secured,
          0,
          { spi: SPI, replayWindow: 64, lifetime: { softPackets: '3' } },
          algorithms,
        );
        // On the packet that reaches the limit, or on the next one (spec-notes, 8).
        const warned: boolean[] = [];
        for (let i = 1; i <= 5; i++) {
          const { header } = await arrive(secured, judge.protect(udpFrame(network.inward), handle), `packet ${i}`);
          warned.push((header.flags & Flag.SECURITY_SA_SOFT_EXPIRY_WARN) !== 0);
        }
        bench.log(`soft limit 3 packets; warned: ${warned.map((warn) => (warn ? 'yes' : 'no')).join(', ')}`);
        expect(!warned[0] && !warned[1], 'warned before the limit');
        expect(warned[3] && warned[4], 'not warned after the limit');
      }),
  ),
  must('IPS-030', OBJECT, 'IPsec fails once a hard limit is reached', ['ipsec-limits-ignored'], (bench) =>
    withSecured(bench, async (secured) => {
      const { network } = secured;
      needOption(secured, 'esp', 'tunnel', SaOption.lifetime);
      const [{ algorithms }] = needAlgorithms(secured.offer, 'esp', 'tunnel');
      await outboundSa(secured, 0, { spi: SPI, lifetime: { hardPackets: '2' } }, algorithms);
      for (let i = 0; i < 2; i++) {
        const { plain, wire } = await sendSecured(secured, 0);
        expectOpens(secured, wire, plain, 'esp', `packet ${i + 1}`);
      }
      await network.send(udpFrame(network.outward), {
        flags: Flag.SECURITY,
        resourceId: 0,
        resourceType: R.NET_IPSEC_OUTB_SA,
      });
      const third = await network.sentAfterAll();
      bench.log(`hard limit 2 packets; the third ${third === null ? 'was not sent' : 'was sent'}`);
      expect(third === null, 'a packet was sent after the hard limit was reached');
    }),
  ),
  must('IPS-031', OBJECT, 'With a replay window, a packet is not accepted twice', ['ipsec-replay-unchecked'], (bench) =>
    withInbound(bench, { replayWindow: 64 }, async (secured, handle) => {
      const { judge, network } = secured;
      const wire = judge.protect(udpFrame(network.inward), handle);
      await arrive(secured, wire, 'the packet');
      await network.inject(wire);
      const again = await network.arrivedAfterAll();
      const flags = again?.header.flags ?? 0;
      bench.log(`the replayed packet ${again === null ? 'was dropped' : `came with flags ${hex(flags)}`}`);
      expect(again === null || (flags & Flag.SECURITY_ERR) !== 0, 'a replayed packet was accepted');
    }),
  ),
  must('IPS-032', OBJECT, 'With replay_win_sz 0, there is no replay check', ['ipsec-replay-always'], (bench) =>
    withInbound(bench, { replayWindow: 0 }, async (secured, handle) => {
      const wire = secured.judge.protect(udpFrame(secured.network.inward), handle);
      for (const what of ['the packet', 'the same packet']) {
        const { header } = await arrive(secured, wire, what);
        expect((header.flags & SECURITY) === Flag.SECURITY, `${what} came with flags ${hex(header.flags)}`);
      }
      bench.log('a packet was accepted twice');
    }),
  ),
  option(
    'IPS-033',
    'ESN: the upper half of the sequence number is authenticated',
    SaOption.esn,
    { options: { esn: true }, replayWindow: 64 },
    {},
    (wire, secured, plain) => {
      const opened = inner(secured, wire);
      return opened !== null && isEqual(opened, plain)
        ? null
        : 'an SA with extended sequence numbers does not open the packet';
    },
  ),
  option(
    'IPS-034',
    'UDP_ENCAP: packets leave in UDP',
    SaOption.udpEncap,
    { udpEncap: NAT_T },
    {},
    (wire, secured, plain) => {
      const udp = OUTER + Ipv4.minLength;
      if (wire[OUTER + Ipv4.protocol] !== IpProtocol.udp)
        return `the packet left as IP protocol ${wire[OUTER + Ipv4.protocol]}`;
      const ports = [get16(wire, udp + Udp.sourcePort), get16(wire, udp + Udp.destinationPort)];
      if (ports.join() !== '4500,4500') return `the ports are ${ports.join(' and ')}`;
      const opened = inner(secured, wire);
      return opened !== null && isEqual(opened, plain) ? null : 'the other end does not open the packet';
    },
  ),
  option(
    'IPS-035',
    'COPY_DSCP: the outer DSCP is the inner one',
    SaOption.copyDscp,
    { options: { copyDscp: true } },
    { tos: 0xb8 },
    (wire) =>
      wire[OUTER + Ipv4.tos] >>> 2 === 0x2e
        ? null
        : `the outer DSCP is ${wire[OUTER + Ipv4.tos] >>> 2}, the inner one 46`,
  ),
  option(
    'IPS-036',
    'DEC_TTL: the inner TTL is lowered',
    SaOption.decrementTtl,
    { options: { decrementTtl: true } },
    { ttl: 40 },
    (wire, secured) => {
      const ttl = inner(secured, wire)?.[OUTER + Ipv4.ttl];
      return ttl === 39 ? null : `the inner TTL is ${ttl}, it was 40`;
    },
  ),
  option(
    'IPS-037',
    'COPY_DF: the outer DF bit is the inner one',
    SaOption.copyDf,
    { options: { copyDf: true } },
    { df: true },
    (wire) =>
      (get16(wire, OUTER + Ipv4.flagsFragment) & 0x4000) !== 0 ? null : 'the outer DF bit is clear, the inner one set',
  ),
  option(
    'IPS-038',
    'ECN: the outer ECN field is the inner one',
    SaOption.ecn,
    { options: { ecn: true } },
    { tos: 0x01 },
    (wire) =>
      (wire[OUTER + Ipv4.tos] & 3) === 1
        ? null
        : `the outer ECN field is ${wire[OUTER + Ipv4.tos] & 3}, the inner one 1`,
  ),
  must(
    'IPS-039',
    '5.1.9.7.1',
    'With IPSEC_RECIRCULATE, the flow filter is applied again to the packet in the clear',
    ['flow-recirculate-ignored'],
    (bench) =>
      withSecured(bench, async (secured) => {
        const { admin, judge, network, offer } = secured;
        const [{ algorithms }] = needAlgorithms(offer, 'esp', 'tunnel');
        await ipsecRule(secured, protocolMatch('esp'), { action: Action.ipsecRecirculate });
        need(offer.actions.includes(Action.drop), 'the device cannot drop packets');
        const classified = classification(offer, portMatch(INNER_PORT));
        succeeded(await admin.create(R.NET_FF_GROUP, 1, encodeGroup({ priority: 5 })));
        succeeded(await admin.create(R.NET_FF_CLASSIFIER, 1, classifierBytes(classified)));
        const rule = { group: 1, classifier: 1, priority: 1, action: Action.drop };
        succeeded(await admin.create(R.NET_FF_RULE, 1, ruleBytes(classified, rule)));
        const handle = await inboundSa(secured, 0, { spi: SPI, replayWindow: 64 }, algorithms);
        await network.inject(judge.protect(udpFrame({ ...network.inward, destinationPort: INNER_PORT }), handle));
        await network.inject(judge.protect(udpFrame({ ...network.inward, destinationPort: INNER_PORT + 1 }), handle));
        const received = await network.arrival('a packet that the DROP rule does not match');
        const udp = OUTER + Ipv4.minLength;
        const port = get16(received.frame, udp + Udp.destinationPort);
        bench.log(`of packets to ports ${INNER_PORT} and ${INNER_PORT + 1} in ESP, that to ${port} arrived first`);
        expect(port === INNER_PORT + 1, `a packet to port ${port} arrived, which a DROP rule matches in the clear`);
      }),
  ),
];
