/**
 * The interoperability matrix as a scenario: our gateway on one NIC, the IPsec of the Linux kernel on another, applications
 * behind both. The gateway's NIC is QEMU's (ESP in software) or the software device (ESP in the device): the rest is the same.
 */
import { writeFileSync } from 'node:fs';
import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises';
import { bindFunction } from '../../src/vfio/bind.ts';
import type { Guest } from '../guest/guest.ts';
import { IpCommand } from '../guest/ip.ts';
import {
  applicationAddress,
  ENDS,
  type End,
  type Family,
  hostNumber,
  type InteropCase,
  isExpressible,
  type MatrixPart,
  matrixPart,
  NAT_T_PORT,
  ourSa,
  type Where,
} from '../ipsec/cases.ts';
import { Epoll } from '../ipsec/epoll.ts';
import { type Application, EchoService, Exchange } from '../ipsec/exchange.ts';
import { Gateway } from '../ipsec/gateway.ts';
import { openEncapsulationSocket } from '../ipsec/nat-traversal.ts';
import { allowPings } from '../ipsec/sockets.ts';
import { showState, xfrmCommands } from '../ipsec/xfrm.ts';
import type { Scenario, ScenarioDevice } from '../scenario.ts';

const OURS_MAC = '52:54:00:00:07:01';
const KERNEL_MAC = '52:54:00:00:07:02';
const APPLICATION = 'app';
const TUN = 'tun0';
/** The smallest that IPv6 allows: no transform makes a packet of it that does not fit 1500. */
const TUN_MTU = 1280;
/** What crosses in each case, each way. The stream is twice what TCP sends before the first acknowledgement. */
const AMOUNT = { pings: 2, sizes: [1, 64, 500, 1200], bytes: 24 * 1024 } as const;
/** Cases that run side by side. */
const SIDE_BY_SIDE = 8;
/** Rounds of the gateway after which everything else in this process has its turn. */
const ROUNDS = 16;
const SETTLE_MS = 30_000;
const SETTLE_STEP_MS = 20;
const XFRM_ERRORS = '/proc/net/xfrm_stat';
/** Documentation/admin-guide/sysctl/kernel.rst, modprobe. */
const MODULE_LOADER = '/proc/sys/kernel/modprobe';
/** What the kernel's algorithms need and is no part of the kernel itself. */
const CIPHER_MODULES = [
  ...['authenc', 'authencesn', 'seqiv', 'echainiv', 'drbg', 'gcm', 'ccm', 'ctr', 'ghash_generic', 'xcbc'],
  ...['sha512_generic', 'chacha_generic', 'poly1305_generic', 'chacha20poly1305'],
] as const;
const FAMILIES = [4, 6] as const;
/** Where the applications of both ends are. */
const SIDES = { ours: { namespace: APPLICATION }, kernel: { namespace: null } } as const;
const GATEWAY_CLOSES = 'the gateway closes its NIC';

export interface InteropOptions {
  /** They run one after the other in one guest. */
  readonly parts: readonly MatrixPart[];
  readonly where: Where;
}

export function interopScenario({ parts, where }: InteropOptions): Scenario {
  const cases = parts.flatMap((part) => matrixPart(part, where));
  const kernel = { kind: 'virtio-net', id: 'kernel', mac: KERNEL_MAC, iommu: false } as const;
  const devices: ScenarioDevice[] =
    where === 'software'
      ? [
          { kind: 'virtio-net', id: 'ours', mac: OURS_MAC, iommu: true, link: { hub: 0 } },
          { ...kernel, link: { hub: 0 } },
        ]
      : [
          { kind: 'vfio-user', id: 'ours', link: 'wire', args: ['--mac', OURS_MAC] },
          { ...kernel, link: { device: 'ours' } },
        ];
  return {
    title: `IPsec interop with Linux XFRM, ${where}: ${parts.join(', ')}; ${cases.length} cases`,
    machine: { qemu: where === 'software' ? 'stock' : 'vfioUser' },
    devices,
    modules: [
      'virtio_pci',
      'virtio_net',
      'vfio_pci',
      'vfio_iommu_type1',
      'tun',
      'xfrm_user',
      'esp4',
      'esp6',
      'ah4',
      'ah6',
    ],
    timeout: 180 + 4 * cases.length,
    checks: [...cases.map(({ name }) => name), GATEWAY_CLOSES],
    guest: (guest) => runMatrix(guest, cases, where),
  };
}

async function runMatrix(guest: Guest, cases: readonly InteropCase[], where: Where): Promise<void> {
  const bench = await Bench.open(guest, cases, where);
  for (let first = 0; first < cases.length; first += SIDE_BY_SIDE) {
    const together = cases.slice(first, first + SIDE_BY_SIDE);
    await Promise.all(together.map((item, i) => guest.check(item.name, () => bench.run(item, first + i))));
  }
  await guest.check(GATEWAY_CLOSES, () => bench.closeGateway());
  await bench.close();
}

/**
 * All that the cases share: the gateway, the kernel's states and policies, and two namespaces with the addresses of all hosts. One process does it
 * all, because an emulated machine pays for each change from one process to another with its translated code.
 */
class Bench {
  readonly #guest: Guest;
  readonly #where: Where;
  readonly #epoll: Epoll;
  readonly #gateway: Gateway;
  readonly #ip = new IpCommand();
  readonly #closeNatTraversal = openEncapsulationSocket(NAT_T_PORT);
  #closing = false;
  /** Resolved when the gateway was closed, and rejected when it broke before. */
  readonly #over: Promise<void>;

  private constructor(guest: Guest, where: Where, epoll: Epoll, gateway: Gateway) {
    this.#guest = guest;
    this.#where = where;
    this.#epoll = epoll;
    this.#gateway = gateway;
    this.#over = this.#drive();
    // Each case says so.
    this.#over.catch(() => {});
  }

  static async open(guest: Guest, cases: readonly InteropCase[], where: Where): Promise<Bench> {
    const address = guest.address('ours');
    bindFunction(address);
    const epoll = new Epoll();
    const bench = new Bench(guest, where, epoll, await Gateway.open(address, KERNEL_MAC, TUN, epoll));
    const states = cases.flatMap((item, index) => xfrmCommands(item, index));
    guest.must(`modprobe -a ${CIPHER_MODULES.join(' ')}`);
    await withoutModuleLoader(guest, () => {
      bench.#ip.run([...kernelNetwork(guest.interface('kernel'), cases), ...states]);
      return bench.#kernelCounts(cases[0], 0);
    });
    guest.must(`ip -n ${APPLICATION} -batch -`, `${applicationNetwork(cases).join('\n')}\n`);
    for (const { namespace } of Object.values(SIDES)) allowPings(namespace, true);
    return bench;
  }

  async run(item: InteropCase, index: number): Promise<string> {
    const errorsBefore = this.#guest.read(XFRM_ERRORS);
    const sas = [ourSa(item, index, 'ours'), ourSa(item, index, 'kernel')] as const;
    const placement = await this.#gateway.add(hostNumber(index), ...sas);
    const place = this.#where === 'inline' && isExpressible(item) ? 'inline' : 'software';
    if (placement.length !== 2 || placement.some((text) => !text.startsWith(`${place}:`))) {
      throw new Error(`the SAs are not ${place}: ${placement.join('; ')}`);
    }
    const application = (end: End): Application => ({
      namespace: SIDES[end].namespace,
      address: applicationAddress(end, index, item.inner),
    });
    await this.#exchange(application('ours'), application('kernel'));
    const counts = await this.#settle(item, index, errorsBefore);
    // The SAs stay until the gateway is closed: TCP on a slow machine may send its last segment once more.
    return `${counts}; ${[...new Set(placement)].join('; ')}`;
  }

  async closeGateway(): Promise<void> {
    await this.#gateway.removeAll();
    this.#closing = true;
    await this.#over;
    await this.#gateway.close();
  }

  /** Takes back all that `open` has set up. */
  async close(): Promise<void> {
    await this.#epoll.close();
    this.#closeNatTraversal();
    allowPings(SIDES.kernel.namespace, false);
    this.#ip.run(withoutNetwork(this.#guest.interface('kernel')));
    await this.#ip.stop();
  }

  async #drive(): Promise<void> {
    while (!this.#closing) {
      let rounds = 0;
      while (this.#round() && rounds < ROUNDS) rounds++;
      if (rounds === 0) await this.#gateway.sleep();
      else await turn();
    }
  }

  /** Everything that can be done now; false when there is nothing. */
  #round(): boolean {
    const received = this.#gateway.step();
    return this.#epoll.dispatch() || received;
  }

  /** Both directions at once, as between any two hosts. */
  async #exchange(ours: Application, kernel: Application): Promise<void> {
    const parts: { close(): void }[] = [];
    try {
      await new Promise<unknown>((resolve, reject) => {
        const done: Promise<void>[] = [];
        for (const [client, server] of [
          [ours, kernel],
          [kernel, ours],
        ] as const) {
          parts.push(new EchoService(this.#epoll, server, client, reject));
          const exchange = new Exchange(this.#epoll, client, server, AMOUNT);
          parts.push(exchange);
          done.push(exchange.done);
        }
        Promise.race([Promise.all(done), this.#over]).then(resolve, reject);
      });
    } finally {
      for (const part of parts) part.close();
    }
  }

  /**
   * Every packet that one side protected, the other has opened, and none came in the clear. The last ones (an acknowledgement, a
   * FIN) may still be on their way.
   */
  async #settle(item: InteropCase, index: number, errorsBefore: string): Promise<string> {
    for (let waited = 0; ; waited += SETTLE_STEP_MS) {
      const { opened, protected: sent } = this.#gateway.report(hostNumber(index));
      const kernel = await this.#kernelCounts(item, index);
      const errors = this.#guest.read(XFRM_ERRORS);
      if (errors !== errorsBefore) throw new Error(`the kernel counts errors: ${changes(errorsBefore, errors)}`);
      const trouble = this.#gateway.trouble();
      const counts = JSON.stringify({ opened, sent, kernel, trouble });
      if (Object.keys(trouble).length > 0) throw new Error(`not all went well: ${counts}`);
      if (opened > 0 && sent > 0 && kernel.sent === opened && kernel.opened === sent)
        return `${sent} packets there, ${opened} back`;
      if (waited >= SETTLE_MS) throw new Error(`the counts of both sides differ: ${counts}`);
      await sleep(SETTLE_STEP_MS);
    }
  }

  /** Packets that the kernel's two states of a case have processed. Throws when one of them has seen a packet that was replayed or forged. */
  async #kernelCounts(item: InteropCase, index: number): Promise<{ opened: number; sent: number }> {
    const states = (['ours', 'kernel'] as const).map((from) => showState(item, index, from));
    const text = await this.#ip.ask(states, /(?:failed \d+\s[\s\S]*){2}/);
    for (const [line, ...counts] of text.matchAll(/replay-window (\d+) replay (\d+) failed (\d+)/g)) {
      if (counts.some((count) => count !== '0')) throw new Error(`a state of the kernel's counts ${line}`);
    }
    const [opened, sent] = [...text.matchAll(/lifetime current:\s+\d+\(bytes\), (\d+)\(packets\)/g)].map((match) =>
      Number(match[1]),
    );
    return { opened, sent };
  }
}

/**
 * Does `work` while the kernel starts no program to load modules: it would for each algorithm and each combination that it hears of first, nearly
 * two hundred times in vain.
 */
async function withoutModuleLoader(guest: Guest, work: () => Promise<unknown>): Promise<void> {
  const loader = guest.read(MODULE_LOADER);
  writeFileSync(MODULE_LOADER, '\n');
  try {
    await work();
  } finally {
    writeFileSync(MODULE_LOADER, loader);
  }
}

/** The lines of xfrm_stat (Documentation/networking/xfrm_proc.rst) that are different now. */
function changes(before: string, after: string): string {
  const old = before.split('\n');
  return after
    .split('\n')
    .filter((line) => !old.includes(line))
    .map((line) => line.trim().replace(/\s+/, ' '))
    .join(', ');
}

/** The host of each case at `end`, one for each family that it is a host of. */
function hosts(
  end: End,
  cases: readonly InteropCase[],
): readonly { readonly address: string; readonly family: Family }[] {
  return cases.map(({ inner: family }, index) => ({ address: applicationAddress(end, index, family), family }));
}

/** Prefix of all hosts at `end`. */
const prefix = (end: End, family: Family) => (family === 4 ? `${ENDS[end].hosts[4]}0/24` : `${ENDS[end].hosts[6]}/64`);
const addAddress = (interfaceName: string, address: string, family: Family) =>
  family === 4 ? `addr add ${address}/32 dev ${interfaceName}` : `addr add ${address}/128 dev ${interfaceName} nodad`;

/** Commands for the kernel's side, which also make the namespace of ours. */
function kernelNetwork(nic: string, cases: readonly InteropCase[]): string[] {
  const { ours, kernel } = ENDS;
  return [
    `netns add ${APPLICATION}`,
    `link set ${TUN} netns ${APPLICATION}`,
    `link set ${nic} up`,
    `addr add ${kernel.gateway[4]}/24 dev ${nic}`,
    `addr add ${kernel.gateway[6]}/64 dev ${nic} nodad`,
    ...FAMILIES.map((family) => `neigh add ${ours.gateway[family]} lladdr ${OURS_MAC} dev ${nic}`),
    ...FAMILIES.map((family) => `route add ${prefix('ours', family)} via ${ours.gateway[family]} dev ${nic}`),
    ...hosts('kernel', cases).map(({ address, family }) => addAddress('lo', address, family)),
  ];
}

/** Commands for the namespace of our applications. */
function applicationNetwork(cases: readonly InteropCase[]): string[] {
  return [
    `link set ${TUN} mtu ${TUN_MTU} up`,
    ...hosts('ours', cases).map(({ address, family }) => addAddress(TUN, address, family)),
    ...FAMILIES.map((family) => `route add ${prefix('kernel', family)} dev ${TUN}`),
  ];
}

/** Commands that undo all that. The TUN interface has gone with the gateway, the routes and neighbours go with the link. */
function withoutNetwork(nic: string): string[] {
  return [
    'xfrm state flush',
    'xfrm policy flush',
    `netns del ${APPLICATION}`,
    `addr flush dev ${nic}`,
    `link set ${nic} down`,
    ...FAMILIES.map((family) => `addr flush dev lo to ${prefix('kernel', family)}`),
  ];
}
